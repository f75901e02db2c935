// How a level is cut: units of tiles, blocks of units that stay in the L2 cache, packed sizes.

namespace lasem_fast {
namespace LASEM_ISA {

constexpr int64_t kL2 = 1 << 20;

// Tiles per unit side, so that pool windows never straddle two units.
constexpr int unit_side(int tile, int pool) {
  int n = 1;
  while (n * tile % pool != 0) ++n;
  return n;
}

// A unit in image coordinates. Outputs start at (y, x) of the convolution, windows at (wy, wx).
struct Unit {
  int64_t image;      // prefix * N + sample
  int64_t out_image;  // image of branch 0 in y; branch g is g * N further
  int64_t y, x, wy, wx;
};

LASEM_INLINE Unit unit_of(const LevelPlan& p, int64_t image, int64_t uy, int64_t ux) {
  const LevelShape& s = p.shape;
  const int64_t side = p.unit * p.tile, windows = side / s.pool;
  const int64_t prefix = image / s.samples, sample = image % s.samples;
  return {image,
          prefix * s.branches * s.samples + sample,
          uy * side - s.pool_pad,
          ux * side - s.pool_pad,
          uy * windows,
          ux * windows};
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
  p.backward_scratch = p.batches * (in_batch(p) + out_batch(p, p.out_stride)) + 2 * s.in_channels;
  p.partial_size = p.batches * p.depth * p.out_stride + p.out_stride;
  p.finish_items = p.out_vectors * s.in_channels;
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
