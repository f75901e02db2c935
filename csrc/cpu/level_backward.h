// Backward: the Winograd algorithm differentiated. One transform dM = A dY A' feeds both products,
// dU += V' dM and dV = dM U'; summing the branches is part of the inner dimension of the latter.
// Where the pool makes it cheaper, the weight gradient goes by windows (window_weight_grad.h).

namespace lasem_fast {
namespace LASEM_ISA {

// Gradient of one tile's outputs -> the tile's row of every batch of dM.
template <class F>
LASEM_INLINE void output_grad_tile(const Vec (&d)[F::kTile][F::kTile], Scalar* m,
                                   int64_t batch_stride) {
  constexpr int n = F::kPoints, k = F::kTile;
  Vec half[n][k];
#pragma GCC unroll 8
  for (int j = 0; j < k; ++j) {
    Vec y[k], t[n];
#pragma GCC unroll 8
    for (int i = 0; i < k; ++i) y[i] = d[i][j];
    F::output_grad(y, t);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) half[i][j] = t[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    Vec t[n];
    F::output_grad(half[i], t);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) store(m + (i * n + j) * batch_stride, t[j]);
  }
}

struct Source {
  const Scalar* dy;
  const uint8_t* code;
  int64_t row, column, lanes;
};

// Undoes the pool and the ReLU: each window's gradient goes where its code says. Returns the bias
// gradient.
template <int kPool, int R>
LASEM_INLINE Vec unpool_unit(const LevelPlan& p, const Unit& u, const Source& from,
                             Vec (&d)[R][R]) {
  const LevelShape& s = p.shape;
  constexpr int windows = R / kPool;
  const bool inside = u.wy + windows <= s.out_height && u.wx + windows <= s.out_width;
  Vec sum = zero();
  if (inside && from.lanes >= kLanes) {
#pragma GCC unroll 4
    for (int wy = 0; wy < windows; ++wy)
#pragma GCC unroll 4
      for (int wx = 0; wx < windows; ++wx) {
        const int64_t at = wy * from.row + wx * from.column;
        const Vec g = load(from.dy + at);
        const Code code = code_load(from.code + at);
        sum = add(sum, keep(code_open(code), g));
#pragma GCC unroll 9
        for (int t = 0; t < kPool * kPool; ++t)
          d[wy * kPool + t / kPool][wx * kPool + t % kPool] = keep(code_is(code, t), g);
      }
    return sum;
  }
  for (int wy = 0; wy < windows; ++wy)
    for (int wx = 0; wx < windows; ++wx) {
      Vec g = zero();
      Code code = code_splat(kNothing);
      if (u.wy + wy < s.out_height && u.wx + wx < s.out_width) {
        const int64_t at = wy * from.row + wx * from.column;
        g = load_some(from.dy + at, from.lanes);
        code = code_load_some(from.code + at, from.lanes);
      }
      sum = add(sum, keep(code_open(code), g));
      for (int t = 0; t < kPool * kPool; ++t)
        d[wy * kPool + t / kPool][wx * kPool + t % kPool] = keep(code_is(code, t), g);
    }
  return sum;
}

// d += B dV B' of one vector of channels: put(i, j, value).
template <class F, class Put>
LASEM_INLINE void input_grad_transform(const Scalar* v, int64_t batch_stride, const Put& put) {
  constexpr int n = F::kPoints, pixels = F::kPatch;
  Vec half[pixels][n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    Vec d[n], t[pixels];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) d[i] = load(v + (i * n + j) * batch_stride);
    F::input_grad(d, t);
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) half[i][j] = t[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i) {
    Vec t[pixels];
    F::input_grad(half[i], t);
#pragma GCC unroll 8
    for (int j = 0; j < pixels; ++j) put(i, j, t[j]);
  }
}

// Adds one tile's dV to the image. Tiles come top-left first, so the leading rows and columns of a
// patch, as many as patches overlap by, were written by the neighbour above or to the left unless
// the tile is the first of its column or row; nobody wrote the others.
template <class F>
static inline void input_grad_tile(const LevelPlan& p, Scalar* image, int64_t y, int64_t x,
                                   Scalar* outside, const Scalar* v, int64_t batch_stride) {
  const LevelShape& s = p.shape;
  const int64_t channels = s.in_channels;
  const int64_t iy = y - s.padding + F::kInset, ix = x - s.padding + F::kInset;
  if constexpr (F::kDirect) {
    constexpr int n = F::kPoints;
    for (int64_t pos = 0; pos < n * n; ++pos) {
      const Scalar* row = v + pos * batch_stride;
      for_patch_runs<F::kFilter>(s, iy + pos / n, ix + pos % n,
                                 [&](int64_t to, int64_t from, int64_t count) {
                                   if (to >= 0) add_run(image + to, row + from, count);
                                 });
    }
  } else {
    constexpr int n = F::kPatch, overlap = F::kFilter - 1;
    const bool first_row = y == -s.pool_pad, first_column = x == -s.pool_pad;
    const auto fresh = [&](int i, int j) {
      return (i >= overlap || first_row) && (j >= overlap || first_column);
    };
    const int64_t whole = channels / kLanes * kLanes;
    Scalar* pixels[n][n];
    patch_pixels<n>(s, image, iy, ix, outside, pixels);
    for (int64_t c = 0; c < whole; c += kLanes)
      input_grad_transform<F>(v + c, batch_stride, [&](int i, int j, Vec d) {
        Scalar* to = pixels[i][j] + c;
        store(to, fresh(i, j) ? d : add(load(to), d));
      });
    if (whole < channels)
      input_grad_transform<F>(v + whole, batch_stride, [&](int i, int j, Vec d) {
        Scalar* to = pixels[i][j] + whole;
        const int64_t left = channels - whole;
        store_n(to, fresh(i, j) ? d : add(load_n(to, left), d), left);
      });
  }
}

// vb [rows, depth] -> dU of one batch and one panel, du [depth, kPanel], stored or added.
LASEM_INLINE void add_panel_grad(const LevelPlan& p, const LevelClass& of, int64_t rows,
                                 const Scalar* vb, const Scalar* mb, bool adds, Scalar* du) {
  if (adds)
    gemm_transposed<true>(rows, p.depth, vb, p.in_row, mb, of.out_row, du, kPanel);
  else
    gemm_transposed<false>(rows, p.depth, vb, p.in_row, mb, of.out_row, du, kPanel);
}

// The panels of a class from `first` to `last`, run by run of neighbouring ones: run(place of its
// first in the class, its first output, outputs).
template <class Run>
LASEM_INLINE void for_runs(const LevelPlan& p, const LevelClass& of, int64_t first, int64_t last,
                           const Run& run) {
  int64_t at = 0;
  while (at < of.panel_count && of.panels[at] < first) ++at;
  for (int64_t end; at < of.panel_count && of.panels[at] < last; at = end) {
    for (end = at + 1; end < of.panel_count && of.panels[end] < last; ++end)
      if (of.panels[end] != of.panels[end - 1] + 1) break;
    const int64_t from = of.panels[at] * kPanel;
    run(at, from, at_most((end - at) * kPanel, p.out_vectors * kLanes - from));
  }
}

// One panel of dV of one batch from a run of panels, whose weights are w: the inner dimension goes
// over the outputs of all slots. The first run stores.
LASEM_INLINE void add_run_product(const LevelPlan& p, const LevelClass& of, int64_t rows,
                                  int64_t depth, const Scalar* mb, int64_t at, const Scalar* w,
                                  Scalar* to) {
  if (at == 0)
    gemm_panel<false>(rows, depth, mb, of.out_row, w, to, p.in_row);
  else
    gemm_panel<true>(rows, depth, mb + at * kPanel, of.out_row, w, to, p.in_row);
}

template <class F, int kPool>
struct Backward {
  static constexpr int side = unit_side(F::kTile, kPool), R = side * F::kTile, tiles = side * side;
  static constexpr bool kByWindow = by_window(F::kPoints, F::kTile, F::kFilter, kPool, F::kDirect);
  const LevelPlan& p;
  const LevelBackward& args;
  Scalar *v, *m, *edge, *du, *dbias;  // edge: C zeros to read, then C to throw away
  uint8_t* wrote;                     // whether dU holds anything, by panel
  WindowWeightGrad<F, kPool> windows;

  Scalar* dx_of(int64_t image) const {
    const LevelShape& s = p.shape;
    return static_cast<Scalar*>(args.dx) + image * s.height * s.width * s.in_channels;
  }

  // Fetches one of `parts` parts of what the gather of a unit reads: no core waits for many lines
  // at once.
  __attribute__((always_inline)) void prefetch(const Unit& u, int64_t part, int64_t parts) const {
    const LevelShape& s = p.shape;
    prefetch_patch(p, static_cast<const Scalar*>(args.x), u, part, parts);
    constexpr int64_t kWindows = R / kPool;
    const int64_t rows = s.slots * kWindows, n = kWindows * s.out_channels;
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
      const int64_t slot = r / kWindows;
      if (!u.takes(slot)) continue;
      const int64_t row = u.out_image(slot, s.samples) * s.out_height + u.wy + r % kWindows;
      const int64_t at = (row * s.out_width + u.wx) * s.out_channels;
      prefetch_run(static_cast<const Scalar*>(args.dy) + at,
                   n * static_cast<int64_t>(sizeof(Scalar)));
      prefetch_run(args.code + at, n);
    }
  }

  // One vector of the outputs' gradients; `to` is where it goes in the rows of dM.
  void gather_output(const LevelClass& of, const Unit& u, int64_t vector, Scalar* to,
                     int64_t m_stride) const {
    const LevelShape& s = p.shape;
    const int64_t slot = vector / p.branch_vectors;
    const int64_t co = vector % p.branch_vectors * kLanes, column = s.out_channels;
    const int64_t row = s.out_width * column;
    const int64_t image_row = u.out_image(slot, s.samples) * s.out_height + u.wy;
    const int64_t at = image_row * row + u.wx * column + co;
    const Source from = {static_cast<const Scalar*>(args.dy) + at, args.code + at, row, column,
                         column - co};
    Vec d[R][R];
    const Vec sum = unpool_unit<kPool, R>(p, u, from, d);
    store(dbias + vector * kLanes, add(load(dbias + vector * kLanes), sum));
    if (kByWindow && !args.dx) return;  // nobody asks for dM
    if constexpr (side == 1) {
      output_grad_tile<F>(d, to + u.first_tile * of.out_row, m_stride);
    } else {
      for (int t = 0; t < tiles; ++t) {
        if (!u.has_tile(t / side, t % side)) continue;
        Vec part[F::kTile][F::kTile];
#pragma GCC unroll 16
        for (int e = 0; e < F::kTile * F::kTile; ++e)
          part[e / F::kTile][e % F::kTile] =
              d[t / side * F::kTile + e / F::kTile][t % side * F::kTile + e % F::kTile];
        output_grad_tile<F>(part, to + u.tile(t / side, t % side) * of.out_row, m_stride);
      }
    }
  }

  // vb [rows, depth] -> dU of one batch, panel by panel of the class; the first block stores.
  void add_weight_grad(const LevelClass& of, int64_t rows, const Scalar* vb, const Scalar* mb,
                       int64_t b) const {
    for (int64_t i = 0; i < of.panel_count; ++i)
      add_panel_grad(p, of, rows, vb, mb + i * kPanel, wrote[of.panels[i]],
                     du + (of.panels[i] * p.batches + b) * p.depth * kPanel);
  }

  // dV of one batch.
  void input_grad(const LevelClass& of, int64_t rows, const Scalar* mb, int64_t b,
                  Scalar* vb) const {
    for_runs(p, of, 0, p.out_panels, [&](int64_t at, int64_t from, int64_t depth) {
      for (int64_t panel = 0; panel < p.depth_panels; ++panel) {
        const Scalar* w = static_cast<const Scalar*>(args.packed) +
                          ((panel * p.batches + b) * p.out_stride + from) * kPanel;
        add_run_product(p, of, rows, depth, mb, at, w, vb + panel * kPanel);
      }
    });
  }

  // V and dM of a block, and the bias gradients. In line: a call of its own slows it down.
  __attribute__((always_inline)) void gather(const LevelClass& of, const Unit* block, int64_t units,
                                             int64_t v_stride, int64_t m_stride) const {
    const int64_t vectors = 2 * of.panel_count;
    for (int64_t i = 0; i < units; ++i) {
      if constexpr (!kByWindow)
        input_tiles<F>(p, static_cast<const Scalar*>(args.x), block[i], edge, v, v_stride);
      for (int64_t n = 0; n < vectors; ++n) {
        if (i + 1 < units) prefetch(block[i + 1], n, vectors);
        const int64_t vector = 2 * of.panels[n / 2] + n % 2;
        if (vector < p.out_vectors && block->takes(vector / p.branch_vectors))
          gather_output(of, block[i], vector, m + n * kLanes, m_stride);
      }
    }
  }

  __attribute__((always_inline)) void add_input_grads(const Unit* block, int64_t units,
                                                      int64_t v_stride) const {
    for (int64_t i = 0; i < units; ++i) {
      const Unit& u = block[i];
      for (int64_t ty = 0; ty < u.tiles_y; ++ty)
        for (int64_t tx = 0; tx < u.tiles_x; ++tx)
          input_grad_tile<F>(p, dx_of(u.image), u.y + ty * F::kTile, u.x + tx * F::kTile,
                             edge + p.shape.in_channels, v + u.tile(ty, tx) * p.in_row, v_stride);
    }
  }

  void flush(const LevelClass& of, Unit* block, int64_t units) const {
    if (units == 0) return;
    const int64_t block_tiles = number_tiles(block, units), rows = block_tiles * p.rows_per_tile;
    const int64_t in = in_batch(p, of), out = out_batch(p, of, of.out_row);
    const int64_t v_stride = F::kDirect ? block_tiles * p.in_row : in;
    const int64_t m_stride = F::kDirect ? block_tiles * of.out_row : out;
    gather(of, block, units, v_stride, m_stride);
    if constexpr (kByWindow) windows.add_block(block, units);
    for (int64_t b = 0; b < p.batches; ++b) {
      Scalar* vb = v + b * in;
      const Scalar* mb = m + b * out;
      if constexpr (!kByWindow) add_weight_grad(of, rows, vb, mb, b);
      // V of this batch is spent: dV takes its place.
      if (args.dx) input_grad(of, rows, mb, b, vb);
    }
    for (int64_t i = 0; i < of.panel_count; ++i) wrote[of.panels[i]] = 1;
    if (args.dx) add_input_grads(block, units, v_stride);
  }

  // A sample whose gradient is exactly zero is left out, not multiplied: its input may be inf or
  // NaN.
  bool takes_part(const Unit& u) const {
    const LevelShape& s = p.shape;
    const int64_t size = s.out_height * s.out_width * s.out_channels;
    const Scalar* dy = static_cast<const Scalar*>(args.dy);
    for (int64_t slot = 0; slot < s.slots; ++slot)
      if (u.takes(slot) && any_nonzero(dy + u.out_image(slot, s.samples) * size, size)) return true;
    return false;
  }

  // Whether the image of a unit takes part; zeroes of dx what no tile will store.
  bool begin_image(const Unit& first) const {
    const LevelShape& s = p.shape;
    const int64_t reach_y = p.units_y * R - s.pool_pad + F::kFilter - 1 - s.padding;
    const int64_t reach_x = p.units_x * R - s.pool_pad + F::kFilter - 1 - s.padding;
    const bool covered = !F::kDirect && reach_y >= s.height && reach_x >= s.width;
    const bool part = takes_part(first);
    if (args.dx && (!part || !covered))
      memset(dx_of(first.image), 0, sizeof(Scalar) * s.height * s.width * s.in_channels);
    return part;
  }

  void run(int64_t begin, int64_t end) const {
    const LevelShape& s = p.shape;
    Unit block[kMaxUnits];
    int64_t class_begin = 0;
    for (int64_t i = 0; i < p.class_count && class_begin < end; ++i) {
      const LevelClass& of = p.classes[i];
      const int64_t images = of.count * s.samples;
      const int64_t from = at_least(begin - class_begin, 0);
      const int64_t to = at_most(end - class_begin, images);
      class_begin += images;
      if (from >= to) continue;
      // Columns of dM that no row writes are read by the products.
      if (of.has_idle_vectors)
        memset(m, 0, sizeof(Scalar) * p.batches * out_batch(p, of, of.out_row));
      int64_t units = 0;
      for (int64_t image = from; image < to; ++image) {
        if (!begin_image(unit_of(p, of, image, 0, 0))) continue;
        for (int64_t uy = 0; uy < p.units_y; ++uy)
          for (int64_t ux = 0; ux < p.units_x; ++ux) {
            block[units++] = unit_of(p, of, image, uy, ux);
            if (units == of.block_units) {
              flush(of, block, units);
              units = 0;
            }
          }
      }
      flush(of, block, units);
    }
  }
};

template <class F, int kPool>
static void backward_images(const LevelPlan& p, const LevelBackward& args, Scalar* scratch,
                            int64_t task, int64_t begin, int64_t end) {
  Scalar* partial = static_cast<Scalar*>(args.partial) + task * p.partial_size;
  Scalar* m = scratch + p.in_size;
  // Weights may outgrow the caches, so dU is not zeroed but stored by the first block of a panel.
  if (p.by_window) memset(partial, 0, sizeof(Scalar) * p.bias_at);
  memset(partial + p.bias_at, 0, sizeof(Scalar) * (p.partial_size - p.bias_at));
  uint8_t* wrote = args.wrote + task * p.out_panels;
  memset(wrote, 0, p.out_panels);
  Scalar* edge = m + p.out_size;
  memset(edge, 0, sizeof(Scalar) * 2 * p.shape.in_channels);
  Scalar* window_scratch = edge + round_up(2 * p.shape.in_channels, kLanes);
  const Backward<F, kPool> backward = {p,
                                       args,
                                       scratch,
                                       m,
                                       edge,
                                       partial,
                                       partial + p.bias_at,
                                       wrote,
                                       {p, args, window_scratch, partial}};
  backward.run(begin, end);
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
