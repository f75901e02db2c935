// How a level is cut: units of tiles, blocks of units that stay in the L2 cache, packed sizes.

namespace lasem_fast {
namespace LASEM_ISA {

constexpr int64_t kL2 = 1 << 20;
constexpr int64_t kMaxUnits = 16 * kRows;  // of a block

// Tiles per unit side, so that pool windows never straddle two units.
constexpr int unit_side(int tile, int pool) {
  int n = 1;
  while (n * tile % pool != 0) ++n;
  return n;
}

// Whether the weight gradient goes by windows: where that takes so many fewer products than the
// transforms, (m + r - 1)^2 for m x m outputs, that it pays for its slower inner loop.
constexpr bool by_window(int64_t tile, int64_t filter, int64_t pool, bool direct) {
  const int64_t side = tile + filter - 1;
  return !direct && 7 * filter * filter * tile * tile <= 5 * pool * pool * side * side;
}

// The weight gradient by windows: pixels per side of a unit's inputs, and how many units' inputs,
// one vector of channels of them, leave room in an L1 cache of 32 KiB.
constexpr int window_patch(int side, int filter) { return side + filter - 1; }
constexpr int window_units(int patch) {
  const int units = (26 << 10) / (patch * patch * kLanes * static_cast<int>(sizeof(Scalar)));
  return units > 1 ? units : 1;
}

// A unit in image coordinates. Outputs start at (y, x) of the convolution, windows at (wy, wx).
struct Unit {
  int64_t image;      // prefix * N + sample
  int64_t out_image;  // image of branch 0 in y; branch g is g * N further
  int64_t y, x, wy, wx;
  int64_t tiles_y, tiles_x;  // its tiles that have an output inside the convolution: the first ones
  int64_t first_tile;        // of the block: where its rows start

  bool has_tile(int64_t ty, int64_t tx) const { return ty < tiles_y && tx < tiles_x; }
  int64_t tile(int64_t ty, int64_t tx) const { return first_tile + ty * tiles_x + tx; }
};

LASEM_INLINE Unit unit_of(const LevelPlan& p, int64_t image, int64_t uy, int64_t ux) {
  const LevelShape& s = p.shape;
  const int64_t side = p.unit * p.tile, windows = side / s.pool;
  const int64_t prefix = image / s.samples, sample = image % s.samples;
  const int64_t y = uy * side - s.pool_pad, x = ux * side - s.pool_pad;
  return {image,
          prefix * s.branches * s.samples + sample,
          y,
          x,
          uy * windows,
          ux * windows,
          at_most((s.conv_height - y + p.tile - 1) / p.tile, p.unit),
          at_most((s.conv_width - x + p.tile - 1) / p.tile, p.unit),
          0};
}

// Numbers the tiles of a block; returns how many there are.
LASEM_INLINE int64_t number_tiles(Unit* block, int64_t units) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < units; ++i) {
    block[i].first_tile = tiles;
    tiles += block[i].tiles_y * block[i].tiles_x;
  }
  return tiles;
}

// Rows of a block's products, and the strides between its batches.
LASEM_INLINE int64_t block_rows(const LevelPlan& p) {
  return p.block_units * p.unit * p.unit * p.rows_per_tile;
}
LASEM_INLINE int64_t in_batch(const LevelPlan& p) {
  return block_rows(p) * p.depth_stride + p.batch_pad;
}
LASEM_INLINE int64_t out_batch(const LevelPlan& p, int64_t columns) {
  return block_rows(p) * columns + p.batch_pad;
}

static void make_plan(const LevelShape& s, int64_t threads, bool backward, LevelPlan* out) {
  LevelPlan& p = *out;
  p = {};
  p.shape = s;
  const bool direct = s.tile == 1;
  p.tile = direct ? (s.pool == 3 ? 3 : 2) : s.tile;
  p.unit = unit_side(static_cast<int>(p.tile), static_cast<int>(s.pool));
  const int64_t windows = p.unit * p.tile / s.pool;
  p.units_y = (s.out_height + windows - 1) / windows;
  p.units_x = (s.out_width + windows - 1) / windows;
  p.batches = direct ? 1 : (p.tile + s.filter - 1) * (p.tile + s.filter - 1);
  p.rows_per_tile = direct ? p.tile * p.tile : 1;
  p.depth = direct ? s.filter * s.filter * s.in_channels : s.in_channels;
  p.depth_stride = round_up(p.depth, kPanel);
  p.branch_vectors = (s.out_channels + kLanes - 1) / kLanes;
  p.out_vectors = s.branches * p.branch_vectors;
  p.out_stride = round_up(p.out_vectors * kLanes, kPanel);
  p.batch_pad = kLanes;

  const int64_t unit_rows = p.unit * p.unit * p.rows_per_tile;
  const int64_t row_bytes =
      p.batches * (p.depth_stride + p.out_stride) * static_cast<int64_t>(sizeof(Scalar));
  const int64_t units = s.prefixes * s.samples * p.units_y * p.units_x;
  // A block fills 7/8 of a 1 MiB L2, but has rows enough to use each weight that it loads; the
  // backward loads two weights and stores one, which from the L3 costs more than a block that
  // outgrows the L2.
  const int64_t weight_bytes =
      p.batches * p.depth * p.out_stride * static_cast<int64_t>(sizeof(Scalar));
  const int64_t least = backward && weight_bytes > kL2 ? 9 * kRows : 3 * kRows;
  int64_t rows = at_least(kL2 / 8 * 7 / row_bytes, least);
  rows = at_most(rows, at_least(unit_rows * units / (4 * threads), kRows));
  rows = at_most(rows, 16 * kRows * (direct ? 4 : 1));
  p.block_units = at_least(rows / kRows * kRows / unit_rows, 1);
  p.forward_blocks = (units + p.block_units - 1) / p.block_units;

  const int64_t panels = p.out_stride / kPanel, depth_panels = p.depth_stride / kPanel;
  p.pack_size = p.batches * p.depth * p.out_stride;
  p.pack_items = panels * s.in_channels;
  p.pack_back_size = depth_panels * p.batches * p.out_stride * kPanel;
  p.pack_back_items = p.out_vectors * kLanes;
  p.forward_scratch = p.batches * (in_batch(p) + out_batch(p, kPanel)) + s.in_channels;
  p.by_window = by_window(p.tile, s.filter, s.pool, direct);
  const int64_t outputs = p.out_vectors * kLanes, out_side = p.unit * p.tile;
  if (p.by_window) {
    const int64_t patch = window_patch(static_cast<int>(out_side), static_cast<int>(s.filter));
    const int64_t at_once = window_units(static_cast<int>(patch));
    p.window_patches = at_once * patch * patch * kLanes;
    p.window_lists = (p.block_units + at_once - 1) / at_once * outputs;
    // An int32 takes no more room than a scalar.
    p.window_scratch = p.window_patches + p.window_lists * (2 * at_once * windows * windows + 1);
  }
  p.bias_at = p.by_window ? round_up(s.in_channels, kLanes) * outputs * s.filter * s.filter
                          : p.batches * p.depth * p.out_stride;
  p.partial_size = p.bias_at + p.out_stride;
  p.finish_items = p.by_window ? outputs : p.out_vectors * s.in_channels;
  p.backward_scratch = p.batches * (in_batch(p) + out_batch(p, p.out_stride)) +
                       round_up(2 * s.in_channels, kLanes) + p.window_scratch;
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
