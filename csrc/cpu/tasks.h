// The split of an operator's work over PyTorch's threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "stable_torch.h"
#include "subnormals.h"

namespace lasem_fast {

// Calls f(task) for tasks 0 .. n-1, one per thread of PyTorch's pool, subnormal numbers being zero.
template <class F>
void for_tasks(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const SubnormalsAreZero scope;
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

// Calls f(begin, end) over `items` cut evenly into `tasks`.
template <class F>
void for_ranges(int64_t tasks, int64_t items, const F& f) {
  for_tasks(tasks, [&](int64_t t) { f(items * t / tasks, items * (t + 1) / tasks); });
}

// Calls f(task, item) for items 0 .. n-1, each on whichever task is free: for items of which none
// depends on another.
template <class F>
void for_items(int64_t tasks, int64_t n, const F& f) {
  std::atomic<int64_t> next{0};
  for_tasks(tasks, [&](int64_t task) {
    for (int64_t item = next++; item < n; item = next++) f(task, item);
  });
}

}  // namespace lasem_fast
