// A linear layer on channels-last images, with its weight in the order of channels-first ones.

namespace lasem_fast {
namespace LASEM_ISA {

constexpr int64_t kDepthBlock = 128;          // a panel's piece of the weights fills half an L1
constexpr int64_t kForwardRows = 32 * kRows;  // their piece of x stays in the L2
constexpr int64_t kRunRows = 16 * kRows;      // rows of a panel of x that stay in the L1

static void make_plan(const LinearShape& s, LinearPlan* out) {
  LinearPlan& p = *out;
  p.shape = s;
  p.features = s.pixels * s.channels;
  p.row_blocks = (s.rows + kRows - 1) / kRows;
  const int64_t panels = (s.outputs + kPanel - 1) / kPanel;
  p.pack_size = panels * p.features * kPanel;
  p.pack_items = panels * s.channels;
  p.forward_scratch = kForwardRows * panels * kPanel;
  p.feature_panels = (p.features + kPanel - 1) / kPanel;
  p.feature_stride = (p.feature_panels | 1) * kPanel;
  p.columns_size = s.outputs * p.feature_stride;
  p.backward_scratch = (kRunRows + 2 * s.outputs) * kPanel;
}

// packed [panel][feature in the order of x][kPanel]; one item is one channel of one panel.
static void pack(const LinearPlan& p, const void* weight, void* packed, int64_t begin,
                 int64_t end) {
  const LinearShape& s = p.shape;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / s.channels, c = item % s.channels;
    const int64_t stride = s.channels * kPanel;
    const int64_t outputs = at_most(s.outputs - panel * kPanel, kPanel);
    Scalar* to = static_cast<Scalar*>(packed) + (panel * p.features + c) * kPanel;
    transpose(outputs, s.pixels,
              static_cast<const Scalar*>(weight) + panel * kPanel * p.features + c * s.pixels,
              p.features, to, stride);
    if (outputs == kPanel) continue;
    for (int64_t i = 0; i < s.pixels; ++i)
      memset(to + i * stride + outputs, 0, sizeof(Scalar) * (kPanel - outputs));
  }
}

// One range of row blocks, its sums over the features taken block by block.
static void forward(const LinearPlan& p, const LinearForward& args, void* scratch, int64_t begin,
                    int64_t end) {
  const LinearShape& s = p.shape;
  const Scalar* packed = static_cast<const Scalar*>(args.packed);
  const Scalar* bias = static_cast<const Scalar*>(args.bias);
  Scalar* sums = static_cast<Scalar*>(scratch);
  const int64_t stride = round_up(s.outputs, kPanel);
  const int64_t last = at_most(end * kRows, s.rows);
  for (int64_t first = begin * kRows; first < last; first += kForwardRows) {
    const int64_t rows = at_most(kForwardRows, last - first);
    const Scalar* x = static_cast<const Scalar*>(args.x) + first * p.features;
    for (int64_t k = 0; k < p.features; k += kDepthBlock) {
      const int64_t depth = at_most(kDepthBlock, p.features - k);
      for (int64_t j = 0; j < stride; j += kPanel) {
        const Scalar* w = packed + j * p.features + k * kPanel;
        if (k == 0)
          gemm_panel<false>(rows, depth, x, p.features, w, sums + j, stride);
        else
          gemm_panel<true>(rows, depth, x + k, p.features, w, sums + j, stride);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      Scalar* y = static_cast<Scalar*>(args.y) + (first + i) * s.outputs;
      for (int64_t j = 0; j < s.outputs; j += kLanes) {
        const int64_t left = s.outputs - j;
        store_some(y + j, add(load(sums + i * stride + j), load_some(bias + j, left)), left);
      }
    }
  }
}

// A row whose gradient is exactly zero is left out, not multiplied: its input may be inf or NaN.
static int64_t runs(const LinearPlan& p, const void* dy, RowRun* found, void* dbias) {
  const LinearShape& s = p.shape;
  const Scalar* from = static_cast<const Scalar*>(dy);
  int64_t count = 0;
  for (int64_t r = 0; r < s.rows; ++r) {
    if (!any_nonzero(from + r * s.outputs, s.outputs)) continue;
    RowRun* run = found + count - 1;
    if (count > 0 && run->begin + run->rows == r && run->rows < kRunRows)
      ++run->rows;
    else
      found[count++] = {r, 1};
  }
  for (int64_t j = 0; j < s.outputs; j += kLanes) {
    double sum[kLanes] = {};
    const int64_t n = at_most(kLanes, s.outputs - j);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t i = 0; i < n; ++i) sum[i] += from[r * s.outputs + j + i];
    for (int64_t i = 0; i < n; ++i)
      static_cast<Scalar*>(dbias)[j + i] = static_cast<Scalar>(sum[i]);
  }
  return count;
}

// columns [output][feature in the order of x]; one item is one output.
static void pack_back(const LinearPlan& p, const void* weight, void* columns, int64_t begin,
                      int64_t end) {
  const LinearShape& s = p.shape;
  for (int64_t k = begin; k < end; ++k) {
    Scalar* to = static_cast<Scalar*>(columns) + k * p.feature_stride;
    transpose(s.channels, s.pixels, static_cast<const Scalar*>(weight) + k * p.features, s.pixels,
              to, s.channels);
    memset(to + p.features, 0, sizeof(Scalar) * (p.feature_stride - p.features));
  }
}

// Fetches one panel of some rows ahead of its use: they lie too far apart for the hardware.
template <int kWrite>
LASEM_INLINE void prefetch_rows(const Scalar* from, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int byte = 0; byte < kPanel * static_cast<int>(sizeof(Scalar)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from + r * stride) + byte, kWrite);
}

// The gradients of one panel of features, whose weights are `columns`, each output a row.
struct PanelGradient {
  const LinearPlan& p;
  const LinearBackward& args;
  const Scalar* columns;
  int64_t first, width;  // the panel's first feature, and how many it has
  Scalar *tile, *dweight;

  const Scalar* dy_of(const RowRun& run) const {
    return static_cast<const Scalar*>(args.dy) + run.begin * p.shape.outputs;
  }
  const Scalar* x_of(const RowRun& run) const {
    return static_cast<const Scalar*>(args.x) + run.begin * p.features + first;
  }

  void input(const RowRun& run) const {
    const int64_t outputs = p.shape.outputs;
    const Scalar *dy = dy_of(run), *x = x_of(run);
    Scalar* dx = static_cast<Scalar*>(args.dx) + run.begin * p.features + first;
    for (int64_t r = 0; r < run.rows; r += kRows) {
      const int64_t rows = at_most(kRows, run.rows - r);
      prefetch_rows<0>(x + r * p.features, rows, p.features);
      Scalar* to = dx + r * p.features;
      if (width == kPanel) {
        prefetch_rows<1>(to, rows, p.features);
        gemm_panel<false>(rows, outputs, dy + r * outputs, outputs, columns, to, p.features);
      } else {
        gemm_panel<false>(rows, outputs, dy + r * outputs, outputs, columns, tile, kPanel);
        for (int64_t i = 0; i < rows; ++i)
          memcpy(to + i * p.features, tile + i * kPanel, sizeof(Scalar) * width);
      }
    }
  }

  void weight(const RowRun& run) const {
    const Scalar* x = x_of(run);
    // The rows of x share cache sets: they are put together.
    for (int64_t r = 0; r < run.rows; ++r)
      for (int64_t h = 0; h < kPanel; h += kLanes) {
        const int64_t left = width - h;
        store(tile + r * kPanel + h, left > 0 ? load_some(x + r * p.features + h, left) : zero());
      }
    const int64_t outputs = p.shape.outputs;
    gemm_transposed<true>(run.rows, outputs, dy_of(run), outputs, tile, kPanel, dweight, kPanel);
  }
};

// One range of feature panels: dx, and the weight gradient in the place of the weights. A panel of
// either is put together while it is in use, because its rows share cache sets.
static void backward(const LinearPlan& p, const LinearBackward& args, void* scratch, int64_t begin,
                     int64_t end) {
  Scalar* tile = static_cast<Scalar*>(scratch);
  Scalar* dweight = tile + kRunRows * kPanel;
  Scalar* strip = dweight + p.shape.outputs * kPanel;
  if (args.dx) {
    const int64_t first = begin * kPanel, last = at_most(end * kPanel, p.features);
    int64_t row = 0;
    for (int64_t i = 0; i <= args.run_count; ++i) {
      const int64_t stop = i < args.run_count ? args.runs[i].begin : p.shape.rows;
      for (; row < stop; ++row)
        memset(static_cast<Scalar*>(args.dx) + row * p.features + first, 0,
               sizeof(Scalar) * (last - first));
      if (i < args.run_count) row += args.runs[i].rows;
    }
  }
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel, outputs = p.shape.outputs;
    Scalar* columns = static_cast<Scalar*>(args.columns) + first;
    const PanelGradient gradient = {p,    args,   strip, first, at_most(kPanel, p.features - first),
                                    tile, dweight};
    memset(dweight, 0, sizeof(Scalar) * outputs * kPanel);
    if (args.dx)
      for (int64_t k = 0; k < outputs; ++k)
        memcpy(strip + k * kPanel, columns + k * p.feature_stride, sizeof(Scalar) * kPanel);
    for (int64_t i = 0; i < args.run_count; ++i) {
      if (args.dx) gradient.input(args.runs[i]);
      gradient.weight(args.runs[i]);
    }
    for (int64_t k = 0; k < outputs; ++k)
      memcpy(columns + k * p.feature_stride, dweight + k * kPanel, sizeof(Scalar) * kPanel);
  }
}

// One item is one output.
static void finish(const LinearPlan& p, const void* columns, void* dweight, int64_t begin,
                   int64_t end) {
  const LinearShape& s = p.shape;
  for (int64_t k = begin; k < end; ++k)
    transpose(s.pixels, s.channels, static_cast<const Scalar*>(columns) + k * p.feature_stride,
              s.channels, static_cast<Scalar*>(dweight) + k * p.features, s.pixels);
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
