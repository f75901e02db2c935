// winograd_level and winograd_level_backward: checks, buffers and the split over threads.

#include <algorithm>
#include <atomic>
#include <cstring>

#include "checks.h"
#include "cpu_dispatch.h"
#include "ops.h"
#include "output_pool.h"
#include "scratch.h"
#include "stable_torch.h"
#include "tasks.h"

namespace lasem_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kDirectChannels = 4;  // below, the transforms cost more than they save

LevelShape shape_of(const Tensor& x, const Tensor& weight, int64_t padding, int64_t pool,
                    int64_t pool_pad, int64_t out_h, int64_t out_w, int64_t tile) {
  check_float(x, "x");
  STD_TORCH_CHECK(x.dim() == 5, "x must have shape (P, N, H, W, C), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 5, "weight must have shape (G, Co, C, R, R), got ", weight.dim(),
                  " dimensions");
  LevelShape s{};
  s.prefixes = x.size(0), s.samples = x.size(1), s.height = x.size(2), s.width = x.size(3);
  s.in_channels = x.size(4), s.branches = weight.size(0), s.out_channels = weight.size(1);
  s.filter = weight.size(3);
  s.padding = padding, s.pool = pool, s.pool_pad = pool_pad;
  s.out_height = out_h, s.out_width = out_w;
  check_tensor(x, "x", x.scalar_type(), {s.prefixes, s.samples, s.height, s.width, s.in_channels});
  STD_TORCH_CHECK(s.filter == 3 || s.filter == 5,
                  "weight must have filters of 3 x 3 or 5 x 5, got ", s.filter, " rows");
  check_tensor(weight, "weight", x.scalar_type(),
               {s.branches, s.out_channels, s.in_channels, s.filter, s.filter});
  STD_TORCH_CHECK(s.in_channels > 0 && s.branches > 0 && s.out_channels > 0,
                  "weight must have at least one branch, output and input channel");
  STD_TORCH_CHECK(padding >= 0 && padding < s.filter, "padding must be from 0 to ", s.filter - 1,
                  ", got ", padding);
  STD_TORCH_CHECK(pool >= 1 && pool <= 3, "pool must be 1, 2 or 3, got ", pool);
  STD_TORCH_CHECK(pool_pad >= 0 && pool_pad <= pool / 2,
                  "pool_pad must be from 0 to pool / 2 = ", pool / 2, ", got ", pool_pad);
  STD_TORCH_CHECK(s.filter == 5 ? tile == 2 : tile >= 1 && tile <= 4, "tile must be ",
                  s.filter == 5 ? "2" : "1, 2, 3 or 4", " for filters of ", s.filter, " x ",
                  s.filter, ", got ", tile);
  s.tile = s.filter == 3 && s.in_channels <= kDirectChannels ? 1 : tile;
  s.conv_height = s.height + 2 * padding - (s.filter - 1);
  s.conv_width = s.width + 2 * padding - (s.filter - 1);
  STD_TORCH_CHECK(s.conv_height > 0 && s.conv_width > 0, "x of ", s.height, " x ", s.width,
                  " is smaller than the ", s.filter, " x ", s.filter, " window with padding ",
                  padding);
  for (const auto& [name, out, conv] :
       {std::tuple{"out_h", out_h, s.conv_height}, std::tuple{"out_w", out_w, s.conv_width}})
    // divided, not multiplied: out may be any integer
    STD_TORCH_CHECK(out >= 1 && out - 1 <= (conv + pool_pad - 1) / pool, name,
                    " must be at least 1 and its last window must start inside the convolution's ",
                    conv, " outputs, got ", out);
  return s;
}

// Calls f(begin, end) over `items` cut evenly, for work on the weights: 2048 filters pay for a
// thread.
template <class F>
void for_filters(const LevelShape& s, int64_t threads, int64_t items, const F& f) {
  const int64_t filters = s.in_channels * s.branches * s.out_channels;
  for_ranges(std::min(threads, 1 + filters / 2048), items, f);
}

// Whether y had better go past the caches: too large for an L2, it comes back from further away,
// and a line that is written as a whole need not be read before.
bool streams(const Tensor& y) {
  constexpr int64_t kLarge = 1 << 20, kLine = 64;
  return y.numel() * y.element_size() >= kLarge && y.size(5) * y.element_size() % kLine == 0 &&
         reinterpret_cast<uintptr_t>(y.const_data_ptr()) % kLine == 0;
}

}  // namespace

std::tuple<Tensor, Tensor> winograd_level(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                          int64_t padding, int64_t pool, int64_t pool_pad,
                                          int64_t out_h, int64_t out_w, int64_t tile) {
  const LevelShape s = shape_of(x, weight, padding, pool, pool_pad, out_h, out_w, tile);
  check_tensor(bias, "bias", x.scalar_type(), {s.branches, s.out_channels});
  const LevelKernels& kernels = kernels_for(x.scalar_type()).level;
  const auto size = {s.prefixes, s.branches, s.samples, out_h, out_w, s.out_channels};
  Tensor y = new_output(size, x.scalar_type(), x.element_size());
  Tensor code = new_output(size, ScalarType::Byte, 1);
  if (x.size(0) == 0 || x.size(1) == 0) return {y, code};

  const int64_t threads = torch::stable::get_num_threads();
  LevelPlan plan;
  kernels.plan(s, threads, false, &plan);
  const int64_t tasks = std::min(threads, plan.forward_blocks);
  Layout layout(x.element_size());
  const size_t packed_at = layout.add(plan.pack_size);
  const size_t task_size = [&] {
    Layout one(x.element_size());
    one.add(plan.forward_scratch);
    return one.bytes();
  }();
  const Scratch scratch(layout.bytes() + tasks * task_size);
  char* base = static_cast<char*>(scratch.data());
  LevelForward args{};
  args.x = x.const_data_ptr(), args.weight = weight.const_data_ptr(),
  args.bias = bias.const_data_ptr();
  args.y = y.mutable_data_ptr(), args.packed = base + packed_at;
  args.code = static_cast<uint8_t*>(code.mutable_data_ptr());
  args.streams = streams(y);

  for_filters(s, threads, plan.pack_items, [&](int64_t begin, int64_t end) {
    kernels.pack(plan, args.weight, args.packed, begin, end);
  });
  // Blocks are independent, so whichever thread is free takes the next: the result is the same.
  std::atomic<int64_t> next{0};
  for_tasks(tasks, [&](int64_t task) {
    void* own = base + layout.bytes() + task * task_size;
    for (int64_t b = next++; b < plan.forward_blocks; b = next++)
      kernels.forward(plan, args, own, b, b + 1);
  });
  return {y, code};
}

std::tuple<Tensor, Tensor, Tensor> winograd_level_backward(const Tensor& dy, const Tensor& x,
                                                           const Tensor& code, const Tensor& weight,
                                                           int64_t padding, int64_t pool,
                                                           int64_t pool_pad, int64_t tile,
                                                           bool need_dx) {
  STD_TORCH_CHECK(dy.dim() == 6, "dy must have shape (P, G, N, out_h, out_w, Co), got ", dy.dim(),
                  " dimensions");
  const LevelShape s = shape_of(x, weight, padding, pool, pool_pad, dy.size(3), dy.size(4), tile);
  const auto out = {s.prefixes, s.branches, s.samples, s.out_height, s.out_width, s.out_channels};
  check_tensor(dy, "dy", x.scalar_type(), out);
  check_tensor(code, "code", ScalarType::Byte, out);
  const LevelKernels& kernels = kernels_for(x.scalar_type()).level;
  const int64_t none[] = {0}, bias_size[] = {s.branches, s.out_channels};
  Tensor dx = need_dx ? new_output({s.prefixes, s.samples, s.height, s.width, s.in_channels},
                                   x.scalar_type(), x.element_size())
                      : torch::stable::new_empty(x, {none, 1});
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::new_empty(weight, {bias_size, 2});

  const int64_t images = s.prefixes * s.samples;
  const int64_t threads = torch::stable::get_num_threads();
  LevelPlan plan;
  kernels.plan(s, threads, true, &plan);
  // A task owns whole images, so that no two write the same dx; no image leaves one task of zeros.
  const int64_t tasks = std::max<int64_t>(1, std::min(threads, images));
  Layout layout(x.element_size());
  const size_t packed_at = layout.add(need_dx ? plan.pack_back_size : 0);
  const size_t partial_at = layout.add(tasks * plan.partial_size);
  const size_t task_size = [&] {
    Layout one(x.element_size());
    one.add(plan.backward_scratch);
    return one.bytes();
  }();
  const Scratch scratch(layout.bytes() + tasks * task_size);
  char* base = static_cast<char*>(scratch.data());
  LevelBackward args{};
  args.dy = dy.const_data_ptr(), args.x = x.const_data_ptr(), args.weight = weight.const_data_ptr();
  args.code = static_cast<const uint8_t*>(code.const_data_ptr());
  args.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  args.packed = base + packed_at, args.partial = base + partial_at;
  args.dweight = dweight.mutable_data_ptr(), args.dbias = dbias.mutable_data_ptr();
  args.tasks = tasks;

  if (need_dx)
    for_filters(s, threads, plan.pack_back_items, [&](int64_t begin, int64_t end) {
      kernels.pack_back(plan, args.weight, args.packed, begin, end);
    });
  for_tasks(tasks, [&](int64_t task) {
    kernels.backward(plan, args, base + layout.bytes() + task * task_size, task,
                     images * task / tasks, images * (task + 1) / tasks);
  });
  for_filters(s, threads, plan.finish_items,
              [&](int64_t begin, int64_t end) { kernels.finish(plan, args, begin, end); });
  return {dx, dweight, dbias};
}

}  // namespace lasem_fast
