// winograd_level and winograd_level_backward: checks, buffers and the split over threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

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

constexpr int64_t kDirectChannels = 4;  // below, the transforms cost more than they save

std::atomic<Schedule> schedule{Schedule::kByShape};

std::string branch_name(const char* list, int64_t branch) {
  return std::string(list) + "[" + std::to_string(branch) + "]";
}

// The shape of a level before anything is known of its rows: a slot for every branch.
LevelShape shape_of(const Tensor& x, const std::vector<Tensor>& weights, int64_t padding,
                    int64_t pool, int64_t pool_pad, int64_t out_h, int64_t out_w, int64_t tile) {
  check_float(x, "x");
  STD_TORCH_CHECK(x.dim() == 5, "x must have shape (P, N, H, W, C), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(!weights.empty(), "weights must have at least one branch");
  const Tensor& first = weights[0];
  STD_TORCH_CHECK(first.dim() == 4, "weights[0] must have shape (Co, C, R, R), got ", first.dim(),
                  " dimensions");
  LevelShape s{};
  s.parents = x.size(0), s.samples = x.size(1), s.height = x.size(2), s.width = x.size(3);
  s.in_channels = x.size(4), s.slots = static_cast<int64_t>(weights.size());
  s.out_channels = first.size(0), s.filter = first.size(2);
  s.padding = padding, s.pool = pool, s.pool_pad = pool_pad;
  s.out_height = out_h, s.out_width = out_w;
  check_tensor(x, "x", x.scalar_type(), {s.parents, s.samples, s.height, s.width, s.in_channels});
  STD_TORCH_CHECK(s.filter == 3 || s.filter == 5,
                  "weights[0] must have filters of 3 x 3 or 5 x 5, got ", s.filter, " rows");
  for (int64_t i = 0; i < s.slots; ++i)
    check_tensor(weights[i], branch_name("weights", i), x.scalar_type(),
                 {s.out_channels, s.in_channels, s.filter, s.filter});
  STD_TORCH_CHECK(s.in_channels > 0 && s.out_channels > 0,
                  "weights must have at least one output and input channel");
  STD_TORCH_CHECK(padding >= 0 && padding < s.filter, "padding must be from 0 to ", s.filter - 1,
                  ", got ", padding);
  STD_TORCH_CHECK(pool >= 1 && pool <= 3, "pool must be 1, 2 or 3, got ", pool);
  STD_TORCH_CHECK(pool_pad >= 0 && pool_pad <= pool / 2,
                  "pool_pad must be from 0 to pool / 2 = ", pool / 2, ", got ", pool_pad);
  STD_TORCH_CHECK(s.filter == 5 ? tile == 2 : tile >= 1 && tile <= 4, "tile must be ",
                  s.filter == 5 ? "2" : "1, 2, 3 or 4", " for filters of ", s.filter, " x ",
                  s.filter, ", got ", tile);
  s.tile = s.filter == 3 && s.in_channels <= kDirectChannels ? 1 : tile;
  s.toeplitz = s.filter == 3 && s.tile == 2 && padding == 1 && pool_pad == 0 && s.height <= 2 &&
               s.width <= 2;
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
  const int64_t filters = s.in_channels * s.slots * s.out_channels;
  for_ranges(std::min(threads, 1 + filters / 2048), items, f);
}

// Whether y had better go past the caches: too large for an L2, it comes back from further away,
// and a line that is written as a whole need not be read before.
bool streams(const Tensor& y) {
  constexpr int64_t kLarge = 1 << 20, kLine = 64;
  return y.numel() * y.element_size() >= kLarge && y.size(4) * y.element_size() % kLine == 0 &&
         reinterpret_cast<uintptr_t>(y.const_data_ptr()) % kLine == 0;
}

void plan_level(const LevelKernels& kernels, const LevelShape& s, RowLists& rows, int64_t threads,
                bool backward, LevelPlan* plan) {
  rows.make_room_for_panels(s.slots * s.out_channels);
  kernels.plan(s, rows.table(), rows.classes.data(), static_cast<int64_t>(rows.classes.size()),
               threads, backward, schedule.load(), plan);
}

// Scratch memory: the parts of a layout, then a part of `size` scalars for each task.
class TaskScratch {
 public:
  TaskScratch(const Layout& layout, int64_t tasks, int64_t size, size_t scalar)
      : shared_(layout.bytes()),
        own_([&] {
          Layout one(scalar);
          one.add(size);
          return one.bytes();
        }()),
        scratch_(shared_ + tasks * own_) {}
  void* at(size_t offset) const { return static_cast<char*>(scratch_.data()) + offset; }
  void* of(int64_t task) const { return at(shared_ + task * own_); }

 private:
  size_t shared_, own_;
  Scratch scratch_;
};

void forward_by_block(const LevelKernels& kernels, const LevelPlan& plan, LevelForward args,
                      int64_t threads, size_t scalar) {
  const int64_t tasks = std::min(threads, plan.blocks);
  Layout layout(scalar);
  const size_t packed_at = layout.add(plan.pack_size);
  const TaskScratch scratch(layout, tasks, plan.forward_scratch, scalar);
  args.packed = scratch.at(packed_at);
  for_filters(plan.shape, threads, plan.pack_items, [&](int64_t begin, int64_t end) {
    kernels.pack(plan, args.weights, args.packed, begin, end);
  });
  for_items(tasks, plan.blocks, [&](int64_t task, int64_t block) {
    kernels.forward(plan, args, scratch.of(task), block, block + 1);
  });
}

void forward_by_panel(const LevelKernels& kernels, const LevelPlan& plan, LevelForward args,
                      int64_t threads, size_t scalar) {
  Layout layout(scalar);
  const size_t inputs_at = layout.add(plan.blocks * plan.in_size);
  const TaskScratch scratch(layout, threads, plan.forward_scratch, scalar);
  args.inputs = scratch.at(inputs_at);
  for_items(std::min(threads, plan.blocks), plan.blocks, [&](int64_t task, int64_t block) {
    kernels.gather_inputs(plan, args, scratch.of(task), block);
  });
  for_items(std::min(threads, plan.out_panels), plan.out_panels, [&](int64_t task, int64_t panel) {
    kernels.forward_panel(plan, args, scratch.of(task), panel);
  });
}

void backward_by_block(const LevelKernels& kernels, const LevelPlan& plan, LevelBackward args,
                       const RowLists& rows, int64_t threads, size_t scalar) {
  // A task owns whole images, so that no two write the same dx; no image leaves one task of zeros.
  const int64_t images = rows.split_images(plan.shape.samples, 1).back();
  const int64_t tasks = std::max<int64_t>(1, std::min(threads, images));
  const std::vector<int64_t> begins = rows.split_images(plan.shape.samples, tasks);
  Layout layout(scalar);
  const size_t packed_at = layout.add(args.dx ? plan.pack_back_size : 0);
  const size_t partial_at = layout.add(tasks * plan.partial_size);
  std::vector<uint8_t> wrote(tasks * plan.out_panels);
  const TaskScratch scratch(layout, tasks, plan.backward_scratch, scalar);
  args.packed = scratch.at(packed_at), args.partial = scratch.at(partial_at);
  args.tasks = tasks, args.wrote = wrote.data();

  if (args.dx)
    for_filters(plan.shape, threads, plan.pack_back_items, [&](int64_t begin, int64_t end) {
      kernels.pack_back(plan, args.weights, args.packed, begin, end);
    });
  for_tasks(tasks, [&](int64_t task) {
    kernels.backward(plan, args, scratch.of(task), task, begins[task], begins[task + 1]);
  });
  for_filters(plan.shape, threads, plan.finish_items,
              [&](int64_t begin, int64_t end) { kernels.finish(plan, args, begin, end); });
}

void backward_by_panel(const LevelKernels& kernels, const LevelPlan& plan, LevelBackward args,
                       int64_t threads, size_t scalar) {
  Layout layout(scalar);
  const size_t inputs_at = layout.add(plan.blocks * plan.in_size);
  const size_t outputs_at = layout.add(plan.blocks * plan.out_size);
  const size_t bias_at = layout.add(plan.blocks * plan.out_stride);
  std::vector<int64_t> block_rows(plan.blocks);
  const TaskScratch scratch(layout, threads, plan.backward_scratch, scalar);
  args.inputs = scratch.at(inputs_at), args.outputs = scratch.at(outputs_at);
  args.bias_sums = scratch.at(bias_at), args.block_rows = block_rows.data();
  const auto run = [&](auto kernel, int64_t items) {
    for_items(std::min(threads, items), items,
              [&](int64_t task, int64_t item) { kernel(plan, args, scratch.of(task), item); });
  };
  run(kernels.gather_both, plan.blocks);
  run(kernels.weight_grad_panel, plan.out_panels);
  if (!args.dx) return;
  run(kernels.input_grad_panel, plan.depth_panels);
  run(kernels.add_input_grads, plan.blocks);
}

// Raises where what is added does not fit the level's rows.
void check_skip(const LevelShape& s, const Tensor& x, const std::optional<Tensor>& skip,
                const std::optional<Tensor>& skip_rows, int64_t rows) {
  STD_TORCH_CHECK(skip || !skip_rows, "skip_rows must come with skip, got skip_rows alone");
  if (!skip) return;
  STD_TORCH_CHECK(skip->dim() == 5, "skip must have shape (S, N, conv_h, conv_w, Co), got ",
                  skip->dim(), " dimensions");
  const int64_t count = skip_rows ? skip->size(0) : rows;
  check_tensor(*skip, "skip", x.scalar_type(),
               {count, s.samples, s.conv_height, s.conv_width, s.out_channels});
  if (skip_rows) list_values(*skip_rows, "skip_rows", rows, count);
}

void check_biases(const LevelShape& s, const Tensor& x, const std::vector<Tensor>& biases) {
  const auto count = static_cast<int64_t>(biases.size());
  STD_TORCH_CHECK(count == 0 || count == s.slots, "biases must be none or one for each of the ",
                  s.slots, " branches, got ", count);
  for (int64_t i = 0; i < count; ++i)
    check_tensor(biases[i], branch_name("biases", i), x.scalar_type(), {s.out_channels});
}

std::vector<const void*> addresses(const std::vector<Tensor>& tensors) {
  std::vector<const void*> data;
  for (const Tensor& t : tensors) data.push_back(t.const_data_ptr());
  return data;
}

std::vector<void*> mutable_addresses(const std::vector<Tensor>& tensors) {
  std::vector<void*> data;
  for (const Tensor& t : tensors) data.push_back(t.mutable_data_ptr());
  return data;
}

void zero(const Tensor& t) {
  std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
}

// Zeroes row i of a contiguous tensor for each i.
void zero_rows(const Tensor& t, const int64_t* begin, const int64_t* end) {
  if (t.numel() == 0) return;
  const size_t bytes = static_cast<size_t>(t.numel() / t.size(0)) * t.element_size();
  for (; begin != end; ++begin)
    std::memset(static_cast<char*>(t.mutable_data_ptr()) + *begin * bytes, 0, bytes);
}

}  // namespace

bool force_schedule(const std::string& name) {
  if (name == "")
    schedule = Schedule::kByShape;
  else if (name == "by block")
    schedule = Schedule::kByBlock;
  else if (name == "by panel")
    schedule = Schedule::kByPanel;
  else
    return false;
  return true;
}

std::tuple<Tensor, Tensor> winograd_level(const Tensor& x, const std::vector<Tensor>& weights,
                                          const std::vector<Tensor>& biases, const Tensor& parents,
                                          const Tensor& branches, const std::optional<Tensor>& skip,
                                          const std::optional<Tensor>& skip_rows, int64_t padding,
                                          int64_t pool, int64_t pool_pad, int64_t out_h,
                                          int64_t out_w, int64_t tile, bool relu, bool relu_after) {
  LevelShape s = shape_of(x, weights, padding, pool, pool_pad, out_h, out_w, tile);
  check_biases(s, x, biases);
  RowLists rows(parents, branches, nullptr, s.parents, s.slots);
  check_skip(s, x, skip, skip_rows, rows.rows());
  const LevelKernels& kernels = kernels_for(x.scalar_type()).level;
  const auto size = {rows.rows(), s.samples, out_h, out_w, s.out_channels};
  Tensor y = new_output(size, x.scalar_type(), x.element_size());
  Tensor code = new_output(size, ScalarType::Byte, 1);
  if (!rows.any() || s.samples == 0) return {y, code};

  const int64_t threads = torch::stable::get_num_threads();
  LevelPlan plan;
  s.slots = rows.slots();
  plan_level(kernels, s, rows, threads, false, &plan);
  const std::vector<const void*> weight_data = addresses(weights), bias_data = addresses(biases);
  LevelForward args{};
  args.x = x.const_data_ptr(), args.weights = weight_data.data();
  args.biases = biases.empty() ? nullptr : bias_data.data();
  args.y = y.mutable_data_ptr();
  args.code = static_cast<uint8_t*>(code.mutable_data_ptr());
  args.streams = streams(y);
  args.skip = skip ? skip->const_data_ptr() : nullptr;
  args.skip_rows = skip_rows ? static_cast<const int64_t*>(skip_rows->const_data_ptr()) : nullptr;
  args.relu = relu || (!skip && relu_after), args.relu_after = skip && relu_after;

  const auto& run = plan.by_panel ? forward_by_panel : forward_by_block;
  run(kernels, plan, args, threads, x.element_size());
  return {y, code};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> winograd_level_backward(
    const Tensor& dy, const Tensor& x, const Tensor& code, const std::vector<Tensor>& weights,
    const Tensor& parents, const Tensor& branches, const std::optional<Tensor>& live,
    int64_t padding, int64_t pool, int64_t pool_pad, int64_t tile, bool need_dx,
    bool need_dbiases) {
  STD_TORCH_CHECK(dy.dim() == 5, "dy must have shape (R, N, out_h, out_w, Co), got ", dy.dim(),
                  " dimensions");
  LevelShape s = shape_of(x, weights, padding, pool, pool_pad, dy.size(2), dy.size(3), tile);
  RowLists rows(parents, branches, live ? &*live : nullptr, s.parents, s.slots);
  const auto out = {rows.rows(), s.samples, s.out_height, s.out_width, s.out_channels};
  check_tensor(dy, "dy", x.scalar_type(), out);
  check_tensor(code, "code", ScalarType::Byte, out);
  const LevelKernels& kernels = kernels_for(x.scalar_type()).level;
  const int64_t none[] = {0}, bias_size[] = {s.out_channels};
  Tensor dx = need_dx ? new_output({s.parents, s.samples, s.height, s.width, s.in_channels},
                                   x.scalar_type(), x.element_size())
                      : torch::stable::new_empty(x, {none, 1});
  std::vector<Tensor> dweights, dbiases;
  for (const Tensor& weight : weights) {
    dweights.push_back(torch::stable::empty_like(weight));
    if (need_dbiases) dbiases.push_back(torch::stable::new_empty(weight, {bias_size, 1}));
  }
  for (int64_t branch : rows.idle_branches) {
    zero(dweights[branch]);
    if (need_dbiases) zero(dbiases[branch]);
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t* idle = rows.idle_parents.data();
  const int64_t idle_count = need_dx ? static_cast<int64_t>(rows.idle_parents.size()) : 0;
  for_ranges(std::min(threads, idle_count), idle_count,
             [&](int64_t begin, int64_t end) { zero_rows(dx, idle + begin, idle + end); });
  if (!rows.any()) return {dx, dweights, dbiases};

  s.slots = rows.slots();
  LevelPlan plan;
  plan_level(kernels, s, rows, threads, true, &plan);
  const std::vector<const void*> weight_data = addresses(weights);
  const std::vector<void*> dweight_data = mutable_addresses(dweights);
  const std::vector<void*> dbias_data = mutable_addresses(dbiases);
  LevelBackward args{};
  args.dy = dy.const_data_ptr(), args.x = x.const_data_ptr(), args.weights = weight_data.data();
  args.code = static_cast<const uint8_t*>(code.const_data_ptr());
  args.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  args.dweights = dweight_data.data();
  args.dbiases = need_dbiases ? dbias_data.data() : nullptr;
  if (plan.by_panel)
    backward_by_panel(kernels, plan, args, threads, x.element_size());
  else
    backward_by_block(kernels, plan, args, rows, threads, x.element_size());
  return {dx, dweights, dbiases};
}

Tensor winograd_level_skip_backward(const Tensor& dy, const Tensor& code,
                                    const std::optional<Tensor>& skip_rows,
                                    const std::optional<Tensor>& live, int64_t skips,
                                    int64_t conv_h, int64_t conv_w, int64_t pool,
                                    int64_t pool_pad) {
  check_float(dy, "dy");
  STD_TORCH_CHECK(dy.dim() == 5, "dy must have shape (R, N, out_h, out_w, Co), got ", dy.dim(),
                  " dimensions");
  STD_TORCH_CHECK(pool >= 1 && pool <= 3, "pool must be 1, 2 or 3, got ", pool);
  STD_TORCH_CHECK(pool_pad >= 0 && pool_pad <= pool / 2,
                  "pool_pad must be from 0 to pool / 2 = ", pool / 2, ", got ", pool_pad);
  STD_TORCH_CHECK(skips >= 0 && conv_h > 0 && conv_w > 0,
                  "skips, conv_h and conv_w must be sizes, got ", skips, ", ", conv_h, ", ",
                  conv_w);
  const SkipShape s = {dy.size(0), dy.size(1), dy.size(4), conv_h,  conv_w,
                       dy.size(2), dy.size(3), pool,       pool_pad};
  const auto size = {s.rows, s.samples, s.out_height, s.out_width, s.channels};
  check_tensor(dy, "dy", dy.scalar_type(), size);
  check_tensor(code, "code", ScalarType::Byte, size);
  const std::vector<bool> alive = live_rows(live ? &*live : nullptr, s.rows);
  const int64_t* skip_of =
      skip_rows ? list_values(*skip_rows, "skip_rows", s.rows, skips) : nullptr;
  STD_TORCH_CHECK(skip_of || skips == s.rows, "skips must be the number of rows, ", s.rows,
                  ", without skip_rows, got ", skips);

  std::vector<int64_t> users_at(skips + 1), users;
  for (int64_t row = 0; row < s.rows; ++row)
    if (alive[row]) ++users_at[(skip_of ? skip_of[row] : row) + 1];
  for (int64_t i = 0; i < skips; ++i) users_at[i + 1] += users_at[i];
  users.resize(users_at[skips]);
  std::vector<int64_t> next = users_at;
  for (int64_t row = 0; row < s.rows; ++row)
    if (alive[row]) users[next[skip_of ? skip_of[row] : row]++] = row;

  Tensor dskip = new_output({skips, s.samples, conv_h, conv_w, s.channels}, dy.scalar_type(),
                            dy.element_size());
  SkipBackward args{};
  args.dy = dy.const_data_ptr(), args.code = static_cast<const uint8_t*>(code.const_data_ptr());
  args.dskip = dskip.mutable_data_ptr();
  args.users = users.data(), args.users_at = users_at.data();
  const LevelKernels& kernels = kernels_for(dy.scalar_type()).level;
  const int64_t images = skips * s.samples;
  for_ranges(std::min<int64_t>(torch::stable::get_num_threads(), images), images,
             [&](int64_t begin, int64_t end) { kernels.skip_gradient(s, args, begin, end); });
  return dskip;
}

}  // namespace lasem_fast
