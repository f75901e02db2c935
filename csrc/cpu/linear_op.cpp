// channels_last_linear and its backward: checks, buffers and the split over threads.

#include <algorithm>
#include <memory>
#include <utility>

#include "checks.h"
#include "cpu_dispatch.h"
#include "ops.h"
#include "output_pool.h"
#include "scratch.h"
#include "stable_torch.h"
#include "tasks.h"

namespace lasem_fast {
namespace {

LinearShape shape_of(const Tensor& x, const Tensor& weight) {
  check_float(x, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x must have shape (R, S, C), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape (K, C * S), got ", weight.dim(),
                  " dimensions");
  LinearShape s = {x.size(0), x.size(1), x.size(2), weight.size(0)};
  check_tensor(x, "x", x.scalar_type(), {s.rows, s.pixels, s.channels});
  check_tensor(weight, "weight", x.scalar_type(), {s.outputs, s.channels * s.pixels});
  STD_TORCH_CHECK(s.pixels > 0 && s.channels > 0 && s.outputs > 0,
                  "weight must have at least one output and one feature");
  // The order is the same, and a run of features is faster to transpose than single ones.
  if (s.pixels == 1) std::swap(s.pixels, s.channels);
  return s;
}

// How many of the `items` that a call has of its own are worth a thread each.
int64_t tasks_for(int64_t work, int64_t work_of_a_thread, int64_t items) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  return std::max<int64_t>(1, std::min(threads, work / work_of_a_thread));
}

constexpr int64_t kCopies = 1 << 14, kProducts = 1 << 18;  // that pay for a thread

}  // namespace

Tensor channels_last_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const LinearShape s = shape_of(x, weight);
  check_tensor(bias, "bias", x.scalar_type(), {s.outputs});
  const int64_t size[] = {s.rows, s.outputs};
  Tensor y = torch::stable::new_empty(x, {size, 2});
  if (s.rows == 0) return y;

  const LinearKernels& kernels = kernels_for(x.scalar_type()).linear;
  LinearPlan plan;
  kernels.plan(s, &plan);
  const int64_t copies = s.outputs * plan.features;
  const int64_t tasks = tasks_for(copies * s.rows, kProducts, plan.row_blocks);
  Layout layout(x.element_size()), own(x.element_size());
  layout.add(plan.pack_size);
  own.add(plan.forward_scratch);
  const Scratch scratch(layout.bytes() + tasks * own.bytes());
  char* base = static_cast<char*>(scratch.data());
  const LinearForward args = {x.const_data_ptr(), base, bias.const_data_ptr(),
                              y.mutable_data_ptr()};
  for_ranges(tasks_for(copies, kCopies, plan.pack_items), plan.pack_items,
             [&](int64_t begin, int64_t end) {
               kernels.pack(plan, weight.const_data_ptr(), base, begin, end);
             });
  for_tasks(tasks, [&](int64_t task) {
    kernels.forward(plan, args, base + layout.bytes() + task * own.bytes(),
                    plan.row_blocks * task / tasks, plan.row_blocks * (task + 1) / tasks);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channels_last_linear_backward(const Tensor& dy, const Tensor& x,
                                                                 const Tensor& weight,
                                                                 bool need_dx) {
  const LinearShape s = shape_of(x, weight);
  check_tensor(dy, "dy", x.scalar_type(), {s.rows, s.outputs});
  const LinearKernels& kernels = kernels_for(x.scalar_type()).linear;
  LinearPlan plan;
  kernels.plan(s, &plan);
  const int64_t none[] = {0}, bias_size[] = {s.outputs};
  Tensor dx = need_dx
                  ? new_output({x.size(0), x.size(1), x.size(2)}, x.scalar_type(), x.element_size())
                  : torch::stable::new_empty(x, {none, 1});
  Tensor dweight = new_output({s.outputs, plan.features}, x.scalar_type(), x.element_size());
  Tensor dbias = torch::stable::new_empty(weight, {bias_size, 1});

  const int64_t copies = s.outputs * plan.features;
  const int64_t tasks = tasks_for(copies * s.rows, kProducts, plan.feature_panels);
  const int64_t copy_tasks = tasks_for(copies, kCopies, s.outputs);
  Layout layout(x.element_size()), own(x.element_size());
  layout.add(plan.columns_size);
  own.add(plan.backward_scratch);
  const Scratch scratch(layout.bytes() + tasks * own.bytes());
  char* base = static_cast<char*>(scratch.data());
  const auto found = std::make_unique<RowRun[]>(s.rows);
  LinearBackward args = {dy.const_data_ptr(), x.const_data_ptr(), found.get(), 0, nullptr, base};
  args.dx = need_dx ? dx.mutable_data_ptr() : nullptr;

  args.run_count = kernels.runs(plan, args.dy, found.get(), dbias.mutable_data_ptr());
  if (need_dx)
    for_ranges(copy_tasks, s.outputs, [&](int64_t begin, int64_t end) {
      kernels.pack_back(plan, weight.const_data_ptr(), base, begin, end);
    });
  for_tasks(tasks, [&](int64_t task) {
    kernels.backward(plan, args, base + layout.bytes() + task * own.bytes(),
                     plan.feature_panels * task / tasks, plan.feature_panels * (task + 1) / tasks);
  });
  for_ranges(copy_tasks, s.outputs, [&](int64_t begin, int64_t end) {
    kernels.finish(plan, base, dweight.mutable_data_ptr(), begin, end);
  });
  return {dx, dweight, dbias};
}

}  // namespace lasem_fast
