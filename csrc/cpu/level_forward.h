// Forward: gather and transform a block of tiles, multiply, transform back; bias, ReLU and pool in
// registers.

namespace lasem_fast {
namespace LASEM_ISA {

// Addresses of a patch's pixels, where `outside` stands for each pixel beyond the border.
template <int n, class T>
LASEM_INLINE void patch_pixels(const LevelShape& s, T* image, int64_t iy, int64_t ix, T* outside,
                               T* (&pixels)[n][n]) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      const bool inside = iy + i >= 0 && iy + i < s.height && ix + j >= 0 && ix + j < s.width;
      pixels[i][j] = inside ? image + ((iy + i) * s.width + ix + j) * s.in_channels : outside;
    }
}

// V = B' d B of one vector of channels, where pixel(i, j) gives d; v is the tile's row of batch 0.
template <class F, class Pixel>
LASEM_INLINE void input_transform(const Pixel& pixel, Scalar* v, int64_t batch_stride) {
  constexpr int n = F::kPoints, pixels = F::kPatch;
  constexpr int at_once = n == 6 ? 2 : n;
#pragma GCC unroll 8
  for (int first = 0; first < n; first += at_once) {
    Vec half[at_once][pixels];
#pragma GCC unroll 8
    for (int j = 0; j < pixels; ++j) {
      Vec d[pixels], t[n];
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) d[i] = pixel(i, j);
      F::input(d, t);
#pragma GCC unroll 8
      for (int i = 0; i < at_once; ++i) half[i][j] = t[input_row<n>(first + i)];
    }
#pragma GCC unroll 8
    for (int i = 0; i < at_once; ++i) {
      Vec t[n];
      F::input(half[i], t);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) store(v + (input_row<n>(first + i) * n + j) * batch_stride, t[j]);
    }
  }
}

// The input patch of the tile whose outputs start at (y, x); v is the tile's row of batch 0.
template <class F>
static inline void input_tile(const LevelPlan& p, const Scalar* image, int64_t y, int64_t x,
                              const Scalar* zeros, Scalar* v, int64_t batch_stride) {
  const LevelShape& s = p.shape;
  const int64_t channels = s.in_channels;
  const int64_t iy = y - s.padding + F::kInset, ix = x - s.padding + F::kInset;
  if constexpr (F::kDirect) {
    constexpr int n = F::kPoints;
    for (int64_t pos = 0; pos < n * n; ++pos) {
      Scalar* row = v + pos * batch_stride;
      for_patch_runs<F::kFilter>(
          s, iy + pos / n, ix + pos % n, [&](int64_t from, int64_t to, int64_t count) {
            from < 0 ? zero_run(row + to, count) : copy_run(row + to, image + from, count);
          });
    }
  } else {
    constexpr int n = F::kPatch;
    const int64_t whole = channels / kLanes * kLanes;
    if (iy >= 0 && ix >= 0 && iy + n <= s.height && ix + n <= s.width) {
      const int64_t row = s.width * channels;
      const Scalar* corner = image + iy * row + ix * channels;
      for (int64_t c = 0; c < whole; c += kLanes)
        input_transform<F>([&](int i, int j) { return load(corner + i * row + j * channels + c); },
                           v + c, batch_stride);
      if (whole < channels)
        input_transform<F>(
            [&](int i, int j) {
              return load_n(corner + i * row + j * channels + whole, channels - whole);
            },
            v + whole, batch_stride);
    } else {
      const Scalar* pixels[n][n];
      patch_pixels<n>(s, image, iy, ix, zeros, pixels);
      for (int64_t c = 0; c < whole; c += kLanes)
        input_transform<F>([&](int i, int j) { return load(pixels[i][j] + c); }, v + c,
                           batch_stride);
      if (whole < channels)
        input_transform<F>(
            [&](int i, int j) { return load_n(pixels[i][j] + whole, channels - whole); }, v + whole,
            batch_stride);
    }
  }
}

// The input patches of a unit's tiles, in the rows of those tiles.
template <class F>
static inline void input_tiles(const LevelPlan& p, const Scalar* x, const Unit& u,
                               const Scalar* zeros, Scalar* v, int64_t batch_stride) {
  const LevelShape& s = p.shape;
  const Scalar* image = x + u.image * s.height * s.width * s.in_channels;
  for (int64_t ty = 0; ty < u.tiles_y; ++ty)
    for (int64_t tx = 0; tx < u.tiles_x; ++tx)
      input_tile<F>(p, image, u.y + ty * F::kTile, u.x + tx * F::kTile, zeros,
                    v + u.tile(ty, tx) * p.in_row, batch_stride);
}

// Fetches the rows of a unit's patch that its left neighbour did not read, or one of `parts` parts
// of them: the transform goes through them a column at a time, a pattern the hardware does not
// follow.
LASEM_INLINE void prefetch_patch(const LevelPlan& p, const Scalar* x, const Unit& u, int64_t part,
                                 int64_t parts) {
  const LevelShape& s = p.shape;
  const int64_t side = p.unit * p.tile, overlap = s.filter - 1, rows = side + overlap;
  const int64_t top = u.y - s.padding, left = u.x - s.padding + overlap;
  const int64_t from = at_least(left, 0), to = at_most(left + side, s.width);
  const int64_t bytes = (to - from) * s.in_channels * static_cast<int64_t>(sizeof(Scalar));
  const int64_t end = at_most(top + rows * (part + 1) / parts, s.height);
  for (int64_t y = at_least(top + rows * part / parts, 0); y < end; ++y)
    prefetch_run(x + ((u.image * s.height + y) * s.width + from) * s.in_channels, bytes);
}

// Convolution outputs of one tile and one vector of channels; m is the tile's row of batch 0.
template <class F>
LASEM_INLINE void output_tile(const Scalar* m, int64_t batch_stride, Vec bias,
                              Vec (&y)[F::kTile][F::kTile]) {
  constexpr int n = F::kPoints, k = F::kTile;
  Vec half[k][n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    Vec d[n], t[k];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) d[i] = load(m + (i * n + j) * batch_stride);
    F::output(d, t);
#pragma GCC unroll 8
    for (int i = 0; i < k; ++i) half[i][j] = t[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < k; ++i) {
    Vec t[k];
    F::output(half[i], t);
#pragma GCC unroll 8
    for (int j = 0; j < k; ++j) y[i][j] = add(t[j], bias);
  }
}

// Where one vector of channels of a unit lies in y and code.
struct Sink {
  Scalar* y;
  uint8_t* code;
  int64_t row, column, lanes;
  bool streams;
};

// ReLU and pool of one window. The running maximum starts at 0, where nothing passes: both are one
// compare.
template <int kPool, int R>
LASEM_INLINE void pool_window(const Vec (&o)[R][R], int wy, int wx, Vec& best, Code& code) {
  best = zero();
  code = code_splat(kNothing);
#pragma GCC unroll 9
  for (int t = 0; t < kPool * kPool; ++t) {
    const Vec v = o[wy * kPool + t / kPool][wx * kPool + t % kPool];
    const Mask m = t == 0 ? opens(v) : wins(v, best);
    best = select(m, v, best);
    code = code_select(m, code_splat(t), code);
  }
}

template <int kPool, int R>
LASEM_INLINE void pool_unit(const LevelPlan& p, const Unit& u, Vec (&o)[R][R], const Sink& sink) {
  const LevelShape& s = p.shape;
  constexpr int windows = R / kPool;
  const bool inside = u.y >= 0 && u.x >= 0 && u.y + R <= s.conv_height && u.x + R <= s.conv_width &&
                      u.wy + windows <= s.out_height && u.wx + windows <= s.out_width;
  Vec best;
  Code code;
  if (inside && sink.lanes >= kLanes) {
#pragma GCC unroll 4
    for (int wy = 0; wy < windows; ++wy)
#pragma GCC unroll 4
      for (int wx = 0; wx < windows; ++wx) {
        pool_window<kPool>(o, wy, wx, best, code);
        const int64_t at = wy * sink.row + wx * sink.column;
        sink.streams ? stream(sink.y + at, best) : store(sink.y + at, best);
        code_store(sink.code + at, code);
      }
    return;
  }
  // An output beyond the border must not win its window: 0 never does.
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < R; ++j)
      if (u.y + i < 0 || u.y + i >= s.conv_height || u.x + j < 0 || u.x + j >= s.conv_width)
        o[i][j] = zero();
  for (int wy = 0; wy < windows && u.wy + wy < s.out_height; ++wy)
    for (int wx = 0; wx < windows && u.wx + wx < s.out_width; ++wx) {
      pool_window<kPool>(o, wy, wx, best, code);
      const int64_t at = wy * sink.row + wx * sink.column;
      store_some(sink.y + at, best, sink.lanes);
      code_store_some(sink.code + at, code, sink.lanes);
    }
}

// One vector of channels of the image that is added, null where none is, and the ReLUs around it.
struct Tail {
  const Scalar* skip;
  bool relu, relu_after;
};

// As pool_unit, for any tail.
template <int kPool, int R>
static void pool_unit_with_tail(const LevelPlan& p, const Unit& u, const Vec (&o)[R][R],
                                const Sink& sink, const Tail& tail) {
  const LevelShape& s = p.shape;
  constexpr int windows = R / kPool;
  for (int wy = 0; wy < windows && u.wy + wy < s.out_height; ++wy)
    for (int wx = 0; wx < windows && u.wx + wx < s.out_width; ++wx) {
      Vec best = zero();
      Code code = code_splat(kNothing);
      bool starts = !tail.relu_after;
      for (int t = 0; t < kPool * kPool; ++t) {
        const int i = wy * kPool + t / kPool, j = wx * kPool + t % kPool;
        const int64_t y = u.y + i, x = u.x + j;
        if (y < 0 || y >= s.conv_height || x < 0 || x >= s.conv_width) continue;
        const Scalar* added =
            tail.skip ? tail.skip + (y * s.conv_width + x) * s.out_channels : nullptr;
        take(best, code, starts, t, o[i][j], tail.relu, added, sink.lanes);
      }
      const int64_t at = wy * sink.row + wx * sink.column;
      sink.streams ? stream(sink.y + at, best) : store_some(sink.y + at, best, sink.lanes);
      code_store_some(sink.code + at, code, sink.lanes);
    }
}

// The image that is added to one of a row, null where none is.
LASEM_INLINE const Scalar* skip_image_of(const LevelShape& s, const LevelForward& args, int64_t row,
                                         int64_t sample) {
  if (!args.skip) return nullptr;
  const int64_t image = (args.skip_rows ? args.skip_rows[row] : row) * s.samples + sample;
  return static_cast<const Scalar*>(args.skip) +
         image * s.conv_height * s.conv_width * s.out_channels;
}

// A block of the level, blocks being counted over the classes.
struct Block {
  const LevelClass* of;
  int64_t units, tiles;
  Unit unit[kMaxUnits];
};

static void find_block(const LevelPlan& p, int64_t index, Block* out) {
  Block& b = *out;
  const int64_t per_image = p.units_y * p.units_x;
  b.of = p.classes;
  for (; index >= b.of->blocks; ++b.of) index -= b.of->blocks;
  const int64_t first = index * b.of->block_units;
  b.units = at_most(b.of->block_units, b.of->count * p.shape.samples * per_image - first);
  for (int64_t i = 0; i < b.units; ++i) {
    const int64_t image = (first + i) / per_image, at = (first + i) % per_image;
    b.unit[i] = unit_of(p, *b.of, image, at / p.units_x, at % p.units_x);
  }
  b.tiles = number_tiles(b.unit, b.units);
}

// V of a block.
template <class F>
static void block_inputs(const LevelPlan& p, const LevelForward& args, const Block& block,
                         const Scalar* zeros, Scalar* v) {
  const Scalar* x = static_cast<const Scalar*>(args.x);
  // Direct: the outputs of a tile are further rows of the one product, not further products.
  const int64_t stride = F::kDirect ? block.tiles * p.in_row : in_batch(p, *block.of);
  for (int64_t i = 0; i < block.units; ++i) {
    if (i + 1 < block.units) prefetch_patch(p, x, block.unit[i + 1], 0, 1);
    input_tiles<F>(p, x, block.unit[i], zeros, v, stride);
  }
}

// The outputs of a block in one panel, from V and the panel's weights w; m is room for M.
template <class F, int kPool>
static void block_outputs(const LevelPlan& p, const LevelForward& args, const Block& block,
                          int64_t panel, const Scalar* v, const Scalar* w, Scalar* m) {
  constexpr int side = unit_side(F::kTile, kPool), R = side * F::kTile, tiles = side * side;
  const LevelShape& s = p.shape;
  const int64_t in = in_batch(p, *block.of), out = out_batch(p, *block.of, kPanel);
  const int64_t m_stride = F::kDirect ? block.tiles * kPanel : out;
  for (int64_t b = 0; b < p.batches; ++b)
    gemm_panel<false>(block.tiles * p.rows_per_tile, p.depth, v + b * in, p.in_row,
                      w + b * p.weight_batch, m + b * out, kPanel);
  for (int64_t h = 0; h < 2 && panel * 2 + h < p.out_vectors; ++h) {
    const int64_t vector = panel * 2 + h, slot = vector / p.branch_vectors;
    if (!block.unit->takes(slot)) continue;
    const int64_t co = vector % p.branch_vectors * kLanes, left = s.out_channels - co;
    Vec offset = zero();
    if (args.biases)
      offset =
          load_some(static_cast<const Scalar*>(args.biases[p.rows.branch_of[slot]]) + co, left);
    for (int64_t i = 0; i < block.units; ++i) {
      const Unit& u = block.unit[i];
      const int64_t column = s.out_channels, row = s.out_width * column;
      const int64_t image_row = u.out_image(slot, s.samples) * s.out_height + u.wy;
      const int64_t at = image_row * row + u.wx * column + co;
      const Sink sink = {
          static_cast<Scalar*>(args.y) + at, args.code + at, row, column, left, args.streams};
      Vec o[R][R];
      if constexpr (side == 1) {
        output_tile<F>(m + u.first_tile * kPanel + h * kLanes, m_stride, offset, o);
      } else {
        for (int t = 0; t < tiles; ++t) {
          // What a tile outside the convolution would give is not looked at.
          if (!u.has_tile(t / side, t % side)) continue;
          Vec part[F::kTile][F::kTile];
          output_tile<F>(m + u.tile(t / side, t % side) * kPanel + h * kLanes, m_stride, offset,
                         part);
#pragma GCC unroll 16
          for (int e = 0; e < F::kTile * F::kTile; ++e)
            o[t / side * F::kTile + e / F::kTile][t % side * F::kTile + e % F::kTile] =
                part[e / F::kTile][e % F::kTile];
        }
      }
      if (args.is_plain()) {
        pool_unit<kPool, R>(p, u, o, sink);
      } else {
        // The copy is what goes through memory: o itself stays in registers above.
        Vec spilled[R][R];
        for (int e = 0; e < R * R; ++e) spilled[e / R][e % R] = o[e / R][e % R];
        const Scalar* skip = skip_image_of(s, args, u.rows[slot], u.sample);
        const Tail tail = {skip ? skip + co : nullptr, args.relu, args.relu_after};
        pool_unit_with_tail<kPool, R>(p, u, spilled, sink, tail);
      }
    }
  }
}

template <class F, int kPool>
static void forward_blocks(const LevelPlan& p, const LevelForward& args, Scalar* scratch,
                           int64_t begin, int64_t end) {
  const Scalar* packed = static_cast<const Scalar*>(args.packed);
  Scalar* v = scratch;
  Scalar* m = v + p.in_size;
  Scalar* zeros = m + p.panel_size;
  memset(zeros, 0, sizeof(Scalar) * p.shape.in_channels);
  for (int64_t index = begin; index < end; ++index) {
    Block block;
    find_block(p, index, &block);
    block_inputs<F>(p, args, block, zeros, v);
    for (int64_t i = 0; i < block.of->panel_count; ++i) {
      const int64_t panel = block.of->panels[i];
      block_outputs<F, kPool>(p, args, block, panel, v,
                              packed + panel * p.batches * p.depth * kPanel, m);
    }
  }
  if (args.streams) stream_end();
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
