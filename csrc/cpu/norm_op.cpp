// norm_level and its backward: checks, buffers, the split over threads, and what is left per row.

#include "norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "checks.h"
#include "cpu_dispatch.h"
#include "ops.h"
#include "output_pool.h"
#include "row_lists.h"
#include "scratch.h"
#include "stable_torch.h"
#include "tasks.h"

namespace lasem_fast {
namespace {

using torch::headeronly::ScalarType;

// Parts of a row: a rule of its size, so that the sums do not depend on the number of threads.
constexpr int64_t kMostParts = 8, kPixelsOfAPart = 1024;

NormShape shape_of(const Tensor& y, int64_t pool, int64_t pool_pad, int64_t out_h, int64_t out_w) {
  check_float(y, "y");
  STD_TORCH_CHECK(y.dim() == 5, "y must have shape (R, N, H, W, C), got ", y.dim(), " dimensions");
  STD_TORCH_CHECK(pool >= 1 && pool <= 3, "pool must be 1, 2 or 3, got ", pool);
  STD_TORCH_CHECK(pool_pad >= 0 && pool_pad <= pool / 2,
                  "pool_pad must be from 0 to pool / 2 = ", pool / 2, ", got ", pool_pad);
  NormShape s{};
  s.rows = y.size(0), s.samples = y.size(1), s.height = y.size(2), s.width = y.size(3);
  s.channels = y.size(4), s.out_height = out_h, s.out_width = out_w;
  s.pool = pool, s.pool_pad = pool_pad;
  const int64_t pixels = s.samples * s.height * s.width;
  s.parts = std::max<int64_t>(1, std::min({kMostParts, s.samples, pixels / kPixelsOfAPart}));
  check_tensor(y, "y", y.scalar_type(), {s.rows, s.samples, s.height, s.width, s.channels});
  STD_TORCH_CHECK(s.samples * s.height * s.width > 1 && s.channels > 0,
                  "y must have more than one value per channel, and a channel");
  const int64_t last_y = (out_h - 1) * pool - pool_pad, last_x = (out_w - 1) * pool - pool_pad;
  STD_TORCH_CHECK(out_h > 0 && out_w > 0 && last_y < s.height && last_x < s.width,
                  "out_h and out_w must be sizes of a pool whose windows begin inside of ",
                  s.height, " x ", s.width, ", got ", out_h, " x ", out_w);
  return s;
}

// Of every branch, [C] each; none at all stand for `otherwise`.
template <class T>
class PerBranch {
 public:
  PerBranch(const std::vector<Tensor>& tensors, double otherwise)
      : tensors_(tensors), otherwise_(otherwise) {}
  double at(int64_t branch, int64_t channel) const {
    return tensors_.empty() ? otherwise_ : tensors_[branch].const_data_ptr<T>()[channel];
  }

 private:
  const std::vector<Tensor>& tensors_;
  double otherwise_;
};

const int64_t* checked_branches(const NormShape& s, const Tensor& y,
                                const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases, const Tensor& branches) {
  STD_TORCH_CHECK(weights.size() == biases.size(),
                  "biases must be as many as weights: ", weights.size(), ", got ", biases.size());
  for (const auto* list : {&weights, &biases})
    for (const Tensor& t : *list)
      check_tensor(t, list == &weights ? "weights" : "biases", y.scalar_type(), {s.channels});
  const int64_t limit = weights.empty() ? s.rows : static_cast<int64_t>(weights.size());
  return list_values(branches, "branches", s.rows, limit);
}

int64_t tasks_of(int64_t items) {
  return std::min<int64_t>(torch::stable::get_num_threads(), items);
}

// Sums of each part, what they say of a row, and then each image of it. Where there are rows for all
// threads each thread takes whole ones, which are still in its caches the second time; the sums are
// the same either way.
template <class Sum, class Row, class Image>
void for_rows(const NormShape& s, int64_t tasks, const Sum& sum, const Row& row,
              const Image& image) {
  const int64_t parts = s.rows * s.parts, images = s.rows * s.samples;
  if (s.rows >= tasks) {
    for_items(tasks, s.rows, [&](int64_t task, int64_t r) {
      for (int64_t i = 0; i < s.parts; ++i) sum(task, r * s.parts + i);
      row(r);
      for (int64_t i = 0; i < s.samples; ++i) image(r * s.samples + i);
    });
    return;
  }
  for_items(tasks, parts, sum);
  for_items(tasks, s.rows, [&](int64_t, int64_t r) { row(r); });
  for_ranges(tasks, images, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) image(i);
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const NormShape& s, const Tensor& y, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases, const int64_t* branch_of, const Tensor* skip,
    const int64_t* skip_rows, double eps) {
  const NormKernels& kernels = kernels_for(y.scalar_type()).norm;
  const int64_t size[] = {s.rows, s.channels};
  Tensor out = new_output({s.rows, s.samples, s.out_height, s.out_width, s.channels},
                          y.scalar_type(), sizeof(T));
  Tensor code = new_output({s.rows, s.samples, s.out_height, s.out_width, s.channels},
                           ScalarType::Byte, 1);
  Tensor mean = torch::stable::new_empty(y, {size, 2}), var = torch::stable::new_empty(y, {size, 2});
  const int64_t parts = s.rows * s.parts, row_size = s.rows * s.channels;
  Layout sums(sizeof(double)), own(sizeof(T));
  sums.add(parts * part_size(s));
  const size_t scale_at = own.add(row_size), shift_at = own.add(row_size);
  const Scratch scratch(sums.bytes() + own.bytes());
  double* of_parts = static_cast<double*>(scratch.data());
  char* base = static_cast<char*>(scratch.data()) + sums.bytes();
  T* scale = reinterpret_cast<T*>(base + scale_at);
  T* shift = reinterpret_cast<T*>(base + shift_at);
  NormForward args{};
  args.y = y.const_data_ptr(), args.mean = mean.const_data_ptr();
  args.scale = scale, args.shift = shift;
  args.skip = skip ? skip->const_data_ptr() : nullptr, args.skip_rows = skip_rows;
  args.out = out.mutable_data_ptr();
  args.code = static_cast<uint8_t*>(code.mutable_data_ptr());
  T* means = mean.mutable_data_ptr<T>();
  T* vars = var.mutable_data_ptr<T>();
  const PerBranch<T> weight(weights, 1), bias(biases, 0);
  const double pixels = static_cast<double>(s.height * s.width);
  const auto finish = [&](int64_t row) {
    for (int64_t c = 0; c < s.channels; ++c) {
      double count = 0, middle = 0, square = 0;
      for (int64_t part = 0; part < s.parts; ++part) {
        const double* of_part = of_parts + (row * s.parts + part) * part_size(s);
        const double n = pixels * (s.first_sample(part + 1) - s.first_sample(part));
        const double delta = of_part[c] - middle, share = n / (count + n);
        middle += delta * share;
        square += of_part[s.channels + c] + delta * delta * share * count;
        count += n;
      }
      const int64_t at = row * s.channels + c;
      means[at] = static_cast<T>(middle);
      vars[at] = static_cast<T>(square / count);
      scale[at] = static_cast<T>(weight.at(branch_of[row], c) / std::sqrt(square / count + eps));
      shift[at] = static_cast<T>(bias.at(branch_of[row], c));
    }
  };
  for_rows(
      s, tasks_of(parts),
      [&](int64_t, int64_t part) { kernels.moments(s, args.y, of_parts, part); }, finish,
      [&](int64_t image) { kernels.forward(s, args, image); });
  return {out, code, mean, var};
}

template <class T>
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(
    const NormShape& s, const Tensor& dout, const Tensor& y, const Tensor& code,
    const Tensor& mean, const Tensor& var, const std::vector<Tensor>& weights,
    const int64_t* branch_of, const std::vector<bool>& live, double eps) {
  const NormKernels& kernels = kernels_for(y.scalar_type()).norm;
  Tensor dy = new_output({s.rows, s.samples, s.height, s.width, s.channels}, y.scalar_type(),
                         sizeof(T));
  std::vector<Tensor> dweights, dbiases;
  for (const Tensor& weight : weights)
    for (auto* list : {&dweights, &dbiases}) list->push_back(torch::stable::empty_like(weight));
  const int64_t parts = s.rows * s.parts, row_size = s.rows * s.channels;
  const int64_t tasks = tasks_of(parts);
  Layout sums(sizeof(double)), own(sizeof(T));
  sums.add(parts * part_size(s));
  const size_t scale_at = own.add(row_size), slope_at = own.add(row_size),
               shift_at = own.add(row_size), near_at = own.bytes();
  Layout near(sizeof(T));
  near.add(part_size(s));
  const Scratch scratch(sums.bytes() + own.bytes() + tasks * near.bytes());
  double* of_parts = static_cast<double*>(scratch.data());
  char* base = static_cast<char*>(scratch.data()) + sums.bytes();
  T* scale = reinterpret_cast<T*>(base + scale_at);
  T* slope = reinterpret_cast<T*>(base + slope_at);
  T* shift = reinterpret_cast<T*>(base + shift_at);
  NormBackward args{};
  args.dout = dout.const_data_ptr(), args.y = y.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.scale = scale, args.slope = slope, args.shift = shift;
  args.code = static_cast<const uint8_t*>(code.const_data_ptr());
  args.dy = dy.mutable_data_ptr();
  const PerBranch<T> weight(weights, 1);
  const double count = static_cast<double>(s.samples * s.height * s.width);
  const T* vars = var.const_data_ptr<T>();
  const auto finish = [&](int64_t row) {
    if (!live[row]) return;
    double* of_row = of_parts + row * s.parts * part_size(s);
    for (int64_t c = 0; c < s.channels; ++c) {
      double gradient = 0, product = 0;
      for (int64_t part = 0; part < s.parts; ++part) {
        const double* of_part = of_row + part * part_size(s);
        gradient += of_part[c];
        product += of_part[s.channels + c];
      }
      const int64_t at = row * s.channels + c;
      const double inverse = 1 / std::sqrt(vars[at] + eps);
      const double factor = weight.at(branch_of[row], c) * inverse;
      scale[at] = static_cast<T>(factor);
      slope[at] = static_cast<T>(-factor * inverse * inverse * product / count);
      shift[at] = static_cast<T>(-factor * gradient / count);
      of_row[c] = product * inverse;  // what the row adds to its branch's gradients
      of_row[s.channels + c] = gradient;
    }
  };
  for_rows(
      s, tasks,
      [&](int64_t task, int64_t part) {
        if (live[part / s.parts])
          kernels.gradient_sums(s, args, of_parts, base + near_at + task * near.bytes(), part);
      },
      finish,
      [&](int64_t image) {
        if (live[image / s.samples])
          kernels.backward(s, args, image);
        else
          std::memset(static_cast<T*>(args.dy) + image * s.image(), 0, sizeof(T) * s.image());
      });

  // in the order of the rows, each branch's in double
  const auto total = std::make_unique<double[]>(part_size(s));
  for (size_t branch = 0; branch < weights.size(); ++branch) {
    std::fill_n(total.get(), part_size(s), 0.0);
    for (int64_t row = 0; row < s.rows; ++row) {
      if (!live[row] || branch_of[row] != static_cast<int64_t>(branch)) continue;
      const double* of_row = of_parts + row * s.parts * part_size(s);
      for (int64_t i = 0; i < part_size(s); ++i) total[i] += of_row[i];
    }
    T* dweight = dweights[branch].template mutable_data_ptr<T>();
    T* dbias = dbiases[branch].template mutable_data_ptr<T>();
    for (int64_t c = 0; c < s.channels; ++c) {
      dweight[c] = static_cast<T>(total[c]);
      dbias[c] = static_cast<T>(total[s.channels + c]);
    }
  }
  return {dy, dweights, dbiases};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_level(
    const Tensor& y, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const Tensor& branches, const std::optional<Tensor>& skip,
    const std::optional<Tensor>& skip_rows, double eps, int64_t pool, int64_t pool_pad,
    int64_t out_h, int64_t out_w, bool relu, bool relu_after) {
  NormShape s = shape_of(y, pool, pool_pad, out_h, out_w);
  const int64_t* branch_of = checked_branches(s, y, weights, biases, branches);
  const int64_t* skip_of = nullptr;
  if (skip) {
    STD_TORCH_CHECK(skip->dim() == 5, "skip must have shape (S, N, H, W, C), got ", skip->dim(),
                    " dimensions");
    check_tensor(*skip, "skip", y.scalar_type(),
                 {skip->size(0), s.samples, s.height, s.width, s.channels});
    if (skip_rows) skip_of = list_values(*skip_rows, "skip_rows", s.rows, skip->size(0));
    STD_TORCH_CHECK(skip_of || skip->size(0) == s.rows, "skip must have a row for each of ",
                    s.rows, " rows without skip_rows, got ", skip->size(0));
  }
  s.relu = skip && relu, s.relu_after = relu_after || (!skip && relu);
  const Tensor* added = skip ? &*skip : nullptr;
  const auto run = y.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(s, y, weights, biases, branch_of, added, skip_of, eps);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> norm_level_backward(
    const Tensor& dout, const Tensor& y, const Tensor& code, const Tensor& mean, const Tensor& var,
    const std::vector<Tensor>& weights, const Tensor& branches, const std::optional<Tensor>& live,
    double eps, int64_t pool, int64_t pool_pad) {
  STD_TORCH_CHECK(dout.dim() == 5, "dout must have shape (R, N, out_h, out_w, C), got ",
                  dout.dim(), " dimensions");
  const NormShape s = shape_of(y, pool, pool_pad, dout.size(2), dout.size(3));
  const auto size = {s.rows, s.samples, s.out_height, s.out_width, s.channels};
  check_tensor(dout, "dout", y.scalar_type(), size);
  check_tensor(code, "code", ScalarType::Byte, size);
  check_tensor(mean, "mean", y.scalar_type(), {s.rows, s.channels});
  check_tensor(var, "var", y.scalar_type(), {s.rows, s.channels});
  const int64_t* branch_of = checked_branches(s, y, weights, weights, branches);
  const auto run = y.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(s, dout, y, code, mean, var, weights, branch_of,
             live_rows(live ? &*live : nullptr, s.rows), eps);
}

}  // namespace lasem_fast
