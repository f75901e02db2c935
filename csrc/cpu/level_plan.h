// How a level is cut: units of tiles, blocks of units that stay in the L2 cache, packed sizes.

namespace lasem_fast {
namespace LASEM_ISA {

constexpr int64_t kL2 = 1 << 20;
constexpr int64_t kMaxUnits = 16 * kRows;  // of a block
// By panel it separates what would lie a power of two apart, in few sets of the caches.
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Scalar));

// Tiles per unit side, so that pool windows never straddle two units.
constexpr int unit_side(int tile, int pool) {
  int n = 1;
  while (n * tile % pool != 0) ++n;
  return n;
}

// Whether the weight gradient goes by windows: where that takes so many fewer products than the
// transforms, points^2 for tile^2 outputs, that it pays for its slower inner loop.
constexpr bool by_window(int64_t points, int64_t tile, int64_t filter, int64_t pool, bool direct) {
  return !direct && 7 * filter * filter * tile * tile <= 5 * pool * pool * points * points;
}

// Interpolation points per dimension; unused where the level is direct.
LASEM_INLINE int64_t points_of(const LevelShape& s, int64_t tile) {
  return s.toeplitz ? Toeplitz::kPoints : tile + s.filter - 1;
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
  int64_t image;  // parent * N + sample
  int64_t sample;
  const int64_t* rows;  // of its parent in each slot, -1 where there is none
  int64_t y, x, wy, wx;
  int64_t tiles_y, tiles_x;  // its tiles that have an output inside the convolution: the first ones
  int64_t first_tile;        // of the block: where its rows start

  bool takes(int64_t slot) const { return rows[slot] >= 0; }
  int64_t out_image(int64_t slot, int64_t samples) const { return rows[slot] * samples + sample; }
  bool has_tile(int64_t ty, int64_t tx) const { return ty < tiles_y && tx < tiles_x; }
  int64_t tile(int64_t ty, int64_t tx) const { return first_tile + ty * tiles_x + tx; }
};

// The unit at (uy, ux) of an image of a class.
LASEM_INLINE Unit unit_of(const LevelPlan& p, const LevelClass& of, int64_t image, int64_t uy,
                          int64_t ux) {
  const LevelShape& s = p.shape;
  const int64_t side = p.unit * p.tile, windows = side / s.pool;
  const int64_t parent = of.parents[image / s.samples], sample = image % s.samples;
  const int64_t y = uy * side - s.pool_pad, x = ux * side - s.pool_pad;
  return {parent * s.samples + sample,
          sample,
          p.rows.row_of + parent * s.slots,
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
LASEM_INLINE int64_t block_rows(const LevelPlan& p, const LevelClass& of) {
  return of.block_units * p.unit * p.unit * p.rows_per_tile;
}
LASEM_INLINE int64_t in_batch(const LevelPlan& p, const LevelClass& of) {
  return block_rows(p, of) * p.in_row + p.batch_pad;
}
LASEM_INLINE int64_t out_batch(const LevelPlan& p, const LevelClass& of, int64_t columns) {
  return block_rows(p, of) * columns + p.batch_pad;
}

// Whether panels of weights go outside and blocks inside. Every panel then reads its rows' inputs
// again, from the L3: rows / kPanel times as many bytes as there are weights. Measured with AVX2,
// from 4 L2 of weights on it pays up to 5 kPanel rows, most where they are fewest. Every thread
// needs a panel, and a block whole images.
static bool by_panel(const LevelPlan& p, int64_t threads, bool backward, Schedule schedule) {
  const LevelShape& s = p.shape;
  const bool direct = s.tile == 1;
  const int64_t per_image = p.units_y * p.units_x;
  if (direct || per_image > kMaxUnits) return false;
  if (backward && by_window(points_of(s, p.tile), p.tile, s.filter, s.pool, direct)) return false;
  if (schedule != Schedule::kByShape) return schedule == Schedule::kByPanel;
  const int64_t weight_bytes =
      p.batches * p.depth * p.out_stride * static_cast<int64_t>(sizeof(Scalar));
  int64_t images = 0;  // through all slots
  for (int64_t i = 0; i < p.class_count; ++i)
    images += p.classes[i].count * p.classes[i].slots * s.samples;
  return weight_bytes > 4 * kL2 && p.depth_panels >= threads &&
         p.unit * p.unit * per_image * images <= 5 * kPanel * s.slots;
}

// The panels of a class, and its blocks where the level has `units` units.
static void plan_class(const LevelPlan& p, int64_t units, int64_t threads, bool backward,
                       LevelClass* out) {
  LevelClass& c = *out;
  const LevelShape& s = p.shape;
  const int64_t* rows = p.rows.row_of + c.parents[0] * s.slots;
  c.panel_count = 0;
  c.has_idle_vectors = false;
  for (int64_t panel = 0; panel < p.out_panels; ++panel) {
    int64_t used = 0;
    for (int64_t v = 2 * panel; v < at_most(2 * panel + 2, p.out_vectors); ++v)
      used += rows[v / p.branch_vectors] >= 0;
    if (used) c.panels[c.panel_count++] = panel;
    if (used == 1) c.has_idle_vectors = true;
  }
  c.columns = c.panel_count * kPanel;
  c.out_row = c.columns + p.in_row - p.depth_stride;

  const int64_t unit_rows = p.unit * p.unit * p.rows_per_tile;
  const int64_t row_bytes =
      p.batches * (p.depth_stride + c.columns) * static_cast<int64_t>(sizeof(Scalar));
  // A block fills 3/8 of a 1 MiB L2, where images, weights and their gradients have to lie as well,
  // but has rows enough to use each weight that it loads; the backward loads two weights and stores
  // one, which from the L3 costs more than a block that outgrows the L2. A few images with weights
  // that outgrow the L3 are cut as little as possible.
  const int64_t weight_bytes =
      p.batches * p.depth * c.columns * static_cast<int64_t>(sizeof(Scalar));
  const int64_t least = backward && weight_bytes > kL2 ? 9 * kRows : 3 * kRows;
  const bool few = unit_rows * units <= 64 * kRows * threads;
  const bool huge = few && weight_bytes > 8 * kL2;
  int64_t block = at_least(kL2 / 8 * 3 / row_bytes, huge ? 16 * kRows : least);
  const int64_t parts = huge ? threads : 4 * threads;
  const int64_t even = unit_rows * units / parts;
  block = at_most(block, at_least(huge ? round_up(even, kRows) : even, kRows));
  block = at_most(block, 16 * kRows * (s.tile == 1 ? 4 : 1));
  c.block_units = at_least(block / kRows * kRows / unit_rows, 1);
  // By panel a block owns whole images.
  const int64_t per_image = p.units_y * p.units_x;
  if (p.by_panel) c.block_units = at_least(c.block_units / per_image, 1) * per_image;
  const int64_t own = c.count * s.samples * per_image;
  c.blocks = (own + c.block_units - 1) / c.block_units;
}

static void make_plan(const LevelShape& s, const LevelRows& rows, LevelClass* classes,
                      int64_t class_count, int64_t threads, bool backward, Schedule schedule,
                      LevelPlan* out) {
  LevelPlan& p = *out;
  p = {};
  p.shape = s;
  p.rows = rows;
  p.classes = classes;
  p.class_count = class_count;
  const bool direct = s.tile == 1;
  p.tile = direct ? (s.pool == 3 ? 3 : 2) : s.tile;
  p.unit = unit_side(static_cast<int>(p.tile), static_cast<int>(s.pool));
  const int64_t windows = p.unit * p.tile / s.pool;
  p.units_y = (s.out_height + windows - 1) / windows;
  p.units_x = (s.out_width + windows - 1) / windows;
  const int64_t points = points_of(s, p.tile);
  p.batches = direct ? 1 : points * points;
  p.rows_per_tile = direct ? p.tile * p.tile : 1;
  p.depth = direct ? s.filter * s.filter * s.in_channels : s.in_channels;
  p.depth_stride = round_up(p.depth, kPanel);
  p.branch_vectors = (s.out_channels + kLanes - 1) / kLanes;
  p.out_vectors = s.slots * p.branch_vectors;
  p.out_stride = round_up(p.out_vectors * kLanes, kPanel);
  p.out_panels = p.out_stride / kPanel, p.depth_panels = p.depth_stride / kPanel;
  p.batch_pad = kLanes;

  int64_t units = 0;
  for (int64_t i = 0; i < class_count; ++i)
    units += classes[i].count * s.samples * p.units_y * p.units_x;
  p.by_panel = by_panel(p, threads, backward, schedule);
  p.in_row = p.depth_stride + (p.by_panel ? kLine : 0);
  p.weight_batch = p.depth * kPanel + (p.by_panel ? kLine : 0);
  int64_t block_units = 0, in_size = 0, panel_size = 0, out_size = 0;
  for (int64_t i = 0; i < class_count; ++i) {
    LevelClass& c = classes[i];
    plan_class(p, units, threads, backward, &c);
    p.blocks += c.blocks;
    block_units = at_least(block_units, c.block_units);
    in_size = at_least(in_size, p.batches * in_batch(p, c));
    panel_size = at_least(panel_size, p.batches * out_batch(p, c, kPanel));
    out_size = at_least(out_size, p.batches * out_batch(p, c, c.out_row));
  }

  p.pack_size = p.batches * p.depth * p.out_stride;
  p.pack_items = p.out_panels * s.in_channels;
  p.pack_back_size = p.depth_panels * p.batches * p.out_stride * kPanel;
  p.pack_back_items = p.out_vectors * kLanes;
  p.in_size = in_size, p.panel_size = panel_size, p.out_size = out_size;
  p.forward_scratch = in_size + panel_size + s.in_channels;
  p.by_window = by_window(points, p.tile, s.filter, s.pool, direct);
  const int64_t outputs = p.out_vectors * kLanes, out_side = p.unit * p.tile;
  if (p.by_window) {
    const int64_t patch = window_patch(static_cast<int>(out_side), static_cast<int>(s.filter));
    const int64_t at_once = window_units(static_cast<int>(patch));
    p.window_patches = at_once * patch * patch * kLanes;
    p.window_lists = (block_units + at_once - 1) / at_once * outputs;
    // An int32 takes no more room than a scalar.
    p.window_scratch = p.window_patches + p.window_lists * (2 * at_once * windows * windows + 1);
  }
  p.bias_at = p.by_window ? round_up(s.in_channels, kLanes) * outputs * s.filter * s.filter
                          : p.batches * p.depth * p.out_stride;
  p.partial_size = p.bias_at + p.out_stride;
  p.finish_items = p.by_window ? outputs : p.out_panels * s.in_channels;
  p.backward_scratch = in_size + out_size + round_up(2 * s.in_channels, kLanes) + p.window_scratch;
  if (p.by_panel) {
    const int64_t square = kPanel * kPanel;
    const int64_t room = kL2 / (p.batches * square * static_cast<int64_t>(sizeof(Scalar)));
    p.back_panels = at_most(at_least(room, 1), p.out_panels);
    p.forward_scratch = p.batches * p.weight_batch + panel_size + s.in_channels;
    p.backward_scratch =
        p.batches * at_least(p.weight_batch, p.back_panels * square + kLine) + 2 * s.in_channels;
  }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
