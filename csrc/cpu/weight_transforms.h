// Weights into packed panels (U = G g G'), and the weight gradient out of them (dg = G' dU G).

namespace lasem_fast {
namespace LASEM_ISA {

template <class F>
constexpr int kTaps = F::kFilter * F::kFilter;

// taps [kFilter * kFilter] of one filter per lane -> u [kPoints * kPoints].
template <class F>
static inline void filter_transform(const Vec (&taps)[kTaps<F>], Vec* u) {
  constexpr int n = F::kPoints, r = F::kFilter;
  Vec half[n][r];
  for (int i = 0; i < n; ++i)
    for (int x = 0; x < r; ++x) {
      Vec sum = mul(splat(F::kG[i][0]), taps[x]);
      for (int y = 1; y < r; ++y) sum = fma(splat(F::kG[i][y]), taps[y * r + x], sum);
      half[i][x] = sum;
    }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      Vec sum = mul(splat(F::kG[j][0]), half[i][0]);
      for (int x = 1; x < r; ++x) sum = fma(splat(F::kG[j][x]), half[i][x], sum);
      u[i * n + j] = sum;
    }
}

template <class F>
static inline void filter_gradient(const Vec* u, Vec (&taps)[kTaps<F>]) {
  constexpr int n = F::kPoints, r = F::kFilter;
  Vec half[r][n];
  for (int y = 0; y < r; ++y)
    for (int j = 0; j < n; ++j) {
      Vec sum = mul(splat(F::kG[0][y]), u[j]);
      for (int i = 1; i < n; ++i) sum = fma(splat(F::kG[i][y]), u[i * n + j], sum);
      half[y][j] = sum;
    }
  for (int y = 0; y < r; ++y)
    for (int x = 0; x < r; ++x) {
      Vec sum = mul(splat(F::kG[0][x]), half[y][0]);
      for (int j = 1; j < n; ++j) sum = fma(splat(F::kG[j][x]), half[y][j], sum);
      taps[y * r + x] = sum;
    }
}

// The filters of the first `count` lanes of a vector of outputs, `stride` elements apart.
struct Filters {
  const Scalar* first;
  int64_t stride, count;
};

// Vectors of outputs are counted over all slots, each padded to whole vectors, and beyond them.
LASEM_INLINE Filters filters_of(const LevelPlan& p, const void* const* weights, int64_t vector) {
  const LevelShape& s = p.shape;
  const int64_t slot = vector / p.branch_vectors, co = vector % p.branch_vectors * kLanes;
  if (slot >= s.slots) return {nullptr, 0, 0};
  const int64_t stride = s.in_channels * s.filter * s.filter;
  const Scalar* weight = static_cast<const Scalar*>(weights[p.rows.branch_of[slot]]);
  return {weight + co * stride, stride, at_most(kLanes, s.out_channels - co)};
}

// The taps of kLanes filters `offset` elements on, one filter per lane, zero beyond `count`.
template <class F>
LASEM_INLINE void load_taps(const Filters& filters, int64_t offset, Vec (&taps)[kTaps<F>]) {
  for (int t = 0; t < kTaps<F>; t += kLanes) {
    const auto load_lane = [&](int lane) {
      return load_some(filters.first + offset + lane * filters.stride + t, kTaps<F> - t);
    };
    Vec v[kLanes];
    if (filters.count == kLanes) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) v[lane] = load_lane(lane);
    } else {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane)
        v[lane] = lane < filters.count ? load_lane(lane) : zero();
    }
    transpose_square(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (t + i < kTaps<F>) taps[t + i] = v[i];
  }
}

// Stores the taps of the first n lanes, `stride` elements apart.
template <class F>
LASEM_INLINE void store_taps(const Vec (&taps)[kTaps<F>], Scalar* to, int64_t stride, int64_t n) {
  for (int t = 0; t < kTaps<F>; t += kLanes) {
    if (t + 1 == kTaps<F>) {  // one is left: scalars are stored faster than parts of vectors
      Scalar last[kLanes];
      store(last, taps[t]);
      for (int64_t lane = 0; lane < n; ++lane) to[lane * stride + t] = last[lane];
      break;
    }
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = t + i < kTaps<F> ? taps[t + i] : zero();
    transpose_square(v);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane)
      if (lane < n) store_some(to + lane * stride + t, v[lane], kTaps<F> - t);
  }
}

// The vectors of a panel, batches `batch_stride` apart. Stored together: lines that lie so far
// apart share few sets of the caches, and leave them before a second vector comes.
template <class F>
LASEM_INLINE void store_panel(const Vec (&u)[2][F::kPoints * F::kPoints], Scalar* to,
                              int64_t batch_stride) {
  for (int64_t b = 0; b < F::kPoints * F::kPoints; ++b) {
    store(to + b * batch_stride, u[0][b]);
    store(to + b * batch_stride + kLanes, u[1][b]);
  }
}

// A few input channels of the filters of a panel, side by side. Where the weights are, the filters
// lie so far apart, and are so many, that their lines drive one another out of the cache, and the
// hardware follows none of them.
template <class F>
struct PanelFilters {
  static constexpr int64_t kChannels = 16 * 9 / kTaps<F>, kRow = kChannels * kTaps<F>;
  Scalar taps[2][kLanes * kRow];

  void load(const LevelPlan& p, const void* const* weights, int64_t panel, int64_t c, int64_t n) {
    for (int64_t h = 0; h < 2; ++h) {
      const Filters from = filters_of(p, weights, panel * 2 + h);
      for (int64_t lane = 0; lane < from.count; ++lane)
        copy_run(taps[h] + lane * kRow, from.first + lane * from.stride + c * kTaps<F>,
                 n * kTaps<F>);
    }
  }

  // To the gradients of a vector's filters.
  void store(const LevelPlan& p, const LevelBackward& args, int64_t vector, int64_t c,
             int64_t n) const {
    const LevelShape& s = p.shape;
    const int64_t branch = p.rows.branch_of[vector / p.branch_vectors];
    const int64_t co = vector % p.branch_vectors * kLanes;
    Scalar* to = static_cast<Scalar*>(args.dweights[branch]) + (co * s.in_channels + c) * kTaps<F>;
    for (int64_t lane = 0; lane < at_most(kLanes, s.out_channels - co); ++lane)
      copy_run(to + lane * s.in_channels * kTaps<F>, taps[vector % 2] + lane * kRow, n * kTaps<F>);
  }
};

// Input channels from `begin` to `end` of one panel: to [batch][depth][kPanel], batches
// `batch_stride` apart.
template <class F>
static void pack_channels(const LevelPlan& p, const void* const* weights, int64_t panel,
                          int64_t begin, int64_t end, Scalar* to, int64_t batch_stride) {
  constexpr int64_t at_once = PanelFilters<F>::kChannels;
  const int64_t channels = p.shape.in_channels;
  PanelFilters<F> filters;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t at = (c - begin) % at_once;
    if (at == 0) filters.load(p, weights, panel, c, at_most(at_once, end - c));
    [[maybe_unused]] Vec u[2][F::kPoints * F::kPoints];
    for (int64_t h = 0; h < 2; ++h) {
      Vec taps[kTaps<F>];
      const int64_t count = filters_of(p, weights, panel * 2 + h).count;
      load_taps<F>({filters.taps[h], filters.kRow, count}, at * kTaps<F>, taps);
      if constexpr (F::kDirect) {
        for (int64_t t = 0; t < kTaps<F>; ++t)
          store(to + (t * channels + c) * kPanel + h * kLanes, taps[t]);
      } else {
        filter_transform<F>(taps, u[h]);
      }
    }
    if constexpr (!F::kDirect) store_panel<F>(u, to + c * kPanel, batch_stride);
  }
}

// packed [panel][batch][depth][kPanel]; one item is one input channel of one panel.
template <class F>
static void pack(const LevelPlan& p, const void* const* weights, Scalar* packed, int64_t begin,
                 int64_t end) {
  const int64_t channels = p.shape.in_channels;
  for (int64_t item = begin, n; item < end; item += n) {
    const int64_t panel = item / channels, c = item % channels;
    n = at_most(channels - c, end - item);
    pack_channels<F>(p, weights, panel, c, c + n, packed + panel * p.batches * p.depth * kPanel,
                     p.weight_batch);
  }
}

// One output of one panel of depth, from its filter w, null for a padding lane.
template <class F>
static inline void pack_back_output(const LevelPlan& p, const Scalar* w, int64_t panel, Scalar* to,
                                    int64_t batch_stride) {
  const int64_t channels = p.shape.in_channels;
  if constexpr (F::kDirect) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t k = panel * kPanel + lane;
      to[lane] = w && k < p.depth ? w[k % channels * kTaps<F> + k / channels] : 0;
    }
  } else {
    Vec u[2][F::kPoints * F::kPoints];
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t first = panel * kPanel + h * kLanes;
      const int64_t count = w ? at_least(0, at_most(kLanes, channels - first)) : 0;
      Vec taps[kTaps<F>];
      load_taps<F>({w, kTaps<F>, count}, first * kTaps<F>, taps);
      filter_transform<F>(taps, u[h]);
    }
    store_panel<F>(u, to, batch_stride);
  }
}

// The filter of output o, null for a padding lane.
LASEM_INLINE const Scalar* filter_of(const LevelPlan& p, const void* const* weights, int64_t o) {
  const Filters filters = filters_of(p, weights, o / kLanes);
  const int64_t lane = o % kLanes;
  return lane < filters.count ? filters.first + lane * filters.stride : nullptr;
}

// packed [depth panel][batch][output][kPanel]; one item is one output.
template <class F>
static void pack_back(const LevelPlan& p, const void* const* weights, Scalar* packed, int64_t begin,
                      int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    const Scalar* w = filter_of(p, weights, o);
    for (int64_t panel = 0; panel < p.depth_panels; ++panel)
      pack_back_output<F>(p, w, panel, packed + (panel * p.batches * p.out_stride + o) * kPanel,
                          p.out_stride * kPanel);
  }
}

LASEM_INLINE void store_bias_grad(const LevelPlan& p, const LevelBackward& args, int64_t vector,
                                  Vec sum) {
  if (!args.dbiases) return;
  const LevelShape& s = p.shape;
  const int64_t branch = p.rows.branch_of[vector / p.branch_vectors];
  const int64_t co = vector % p.branch_vectors * kLanes;
  store_some(static_cast<Scalar*>(args.dbiases[branch]) + co, sum, s.out_channels - co);
}

// Sums the tasks' partial gradients in task order; one item is one input channel of one panel.
template <class F>
static void finish(const LevelPlan& p, const LevelBackward& args, int64_t begin, int64_t end) {
  const LevelShape& s = p.shape;
  const Scalar* partial = static_cast<const Scalar*>(args.partial);
  // Of the tasks that wrote to a panel.
  const auto sum_at = [&](int64_t panel, int64_t at) {
    Vec sum = zero();
    for (int64_t t = 0; t < args.tasks; ++t)
      if (args.wrote[t * p.out_panels + panel]) {
        const Scalar* from = partial + t * p.partial_size + at;
        __builtin_prefetch(from + kPanel);  // of the next input channel
        sum = add(sum, load(from));
      }
    return sum;
  };
  PanelFilters<F> filters;
  for (int64_t item = begin, n; item < end; item += n) {
    const int64_t panel = item / s.in_channels, first = item % s.in_channels;
    n = at_most(at_most(filters.kChannels, s.in_channels - first), end - item);
    const int64_t last = at_most(2, p.out_vectors - 2 * panel);
    for (int64_t c = first; c < first + n; ++c) {
      [[maybe_unused]] Vec u[2][F::kPoints * F::kPoints];
      if constexpr (!F::kDirect)
        for (int64_t b = 0; b < F::kPoints * F::kPoints; ++b)
          for (int64_t h = 0; h < 2; ++h)
            u[h][b] = sum_at(panel, ((panel * p.batches + b) * p.depth + c) * kPanel + h * kLanes);
      for (int64_t h = 0; h < last; ++h) {
        Vec taps[kTaps<F>];
        if constexpr (F::kDirect) {
          for (int64_t t = 0; t < kTaps<F>; ++t)
            taps[t] =
                sum_at(panel, (panel * p.depth + t * s.in_channels + c) * kPanel + h * kLanes);
        } else {
          filter_gradient<F>(u[h], taps);
        }
        store_taps<F>(taps, filters.taps[h] + (c - first) * kTaps<F>, filters.kRow, kLanes);
      }
    }
    for (int64_t v = 2 * panel; v < 2 * panel + last; ++v) {
      filters.store(p, args, v, first, n);
      if (first == 0) store_bias_grad(p, args, v, sum_at(panel, p.bias_at + v * kLanes));
    }
  }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
