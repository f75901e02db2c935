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
  p.backward_scratch = kRunRows * kPanel;
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
          gemm_panel<false>(rows, depth, x, p.features, w, kPanel, sums + j, stride);
        else
          gemm_panel<true>(rows, depth, x + k, p.features, w, kPanel, sums + j, stride);
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

// One panel of dx; `tile` takes a panel that is wider than what is left of the features.
static void input_gradient(const LinearPlan& p, const LinearBackward& args, const Scalar* columns,
                           int64_t j, Scalar* tile) {
  const LinearShape& s = p.shape;
  const int64_t width = at_most(kPanel, p.features - j);
  for (int64_t i = 0; i < args.run_count; ++i) {
    const RowRun& run = args.runs[i];
    const Scalar* dy = static_cast<const Scalar*>(args.dy) + run.begin * s.outputs;
    Scalar* dx = static_cast<Scalar*>(args.dx) + run.begin * p.features + j;
    if (width == kPanel) {
      gemm_panel<false>(run.rows, s.outputs, dy, s.outputs, columns, p.feature_stride, dx,
                        p.features);
    } else {
      gemm_panel<false>(run.rows, s.outputs, dy, s.outputs, columns, p.feature_stride, tile,
                        kPanel);
      for (int64_t r = 0; r < run.rows; ++r)
        memcpy(dx + r * p.features, tile + r * kPanel, sizeof(Scalar) * width);
    }
  }
}

// One panel of the weight gradient; `tile` takes what is read of x, whose rows share cache sets.
static void weight_gradient(const LinearPlan& p, const LinearBackward& args, Scalar* columns,
                            int64_t j, Scalar* tile) {
  const LinearShape& s = p.shape;
  const int64_t width = at_most(kPanel, p.features - j);
  for (int64_t i = 0; i < args.run_count; ++i) {
    const RowRun& run = args.runs[i];
    const Scalar* dy = static_cast<const Scalar*>(args.dy) + run.begin * s.outputs;
    const Scalar* x = static_cast<const Scalar*>(args.x) + run.begin * p.features + j;
    for (int64_t r = 0; r < run.rows; ++r)
      for (int64_t h = 0; h < kPanel; h += kLanes) {
        const int64_t left = width - h;
        store(tile + r * kPanel + h, left > 0 ? load_some(x + r * p.features + h, left) : zero());
      }
    if (i == 0)
      gemm_transposed<false>(run.rows, s.outputs, kPanel, dy, s.outputs, tile, kPanel, columns,
                             p.feature_stride);
    else
      gemm_transposed<true>(run.rows, s.outputs, kPanel, dy, s.outputs, tile, kPanel, columns,
                            p.feature_stride);
  }
  if (args.run_count > 0) return;
  for (int64_t k = 0; k < s.outputs; ++k)
    memset(columns + k * p.feature_stride, 0, sizeof(Scalar) * kPanel);
}

// One range of feature panels: dx, and the weight gradient in the place of the weights.
static void backward(const LinearPlan& p, const LinearBackward& args, void* scratch, int64_t begin,
                     int64_t end) {
  Scalar* tile = static_cast<Scalar*>(scratch);
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
    Scalar* columns = static_cast<Scalar*>(args.columns) + panel * kPanel;
    if (args.dx) input_gradient(p, args, columns, panel * kPanel, tile);
    weight_gradient(p, args, columns, panel * kPanel, tile);
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
