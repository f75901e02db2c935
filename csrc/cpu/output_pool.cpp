#include "output_pool.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "pages.h"

namespace lasem_fast {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGrain = 64;  // no slack, so that AddressSanitizer sees the end of a block
constexpr bool kReuse = false;
#else
constexpr size_t kGrain = size_t{256} << 10;
constexpr bool kReuse = true;
#endif

struct Block {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> idle;                   // oldest first
  std::unordered_map<void*, size_t> in_use;  // capacity by address
  size_t idle_bytes = 0, used_bytes = 0, most_used_bytes = 0;
};

Pool& pool() {
  // Never destroyed: a tensor may die after static destruction has begun.
  static auto* instance = new Pool();
  return *instance;
}

std::atomic<bool> poison{false};

void drop(Pool& p, size_t index) {
  p.idle_bytes -= p.idle[index].capacity;
  give_pages_back(p.idle[index].data, p.idle[index].capacity);
  p.idle.erase(p.idle.begin() + index);
}

// The smallest idle block that holds `bytes` without wasting a quarter of itself.
Block take(Pool& p, size_t bytes) {
  size_t best = p.idle.size();
  for (size_t i = 0; i < p.idle.size(); ++i) {
    const size_t capacity = p.idle[i].capacity;
    if (capacity < bytes || capacity / 4 * 3 > bytes) continue;
    if (best == p.idle.size() || capacity < p.idle[best].capacity) best = i;
  }
  if (best == p.idle.size()) return {nullptr, 0};
  const Block block = p.idle[best];
  p.idle_bytes -= block.capacity;
  p.idle.erase(p.idle.begin() + best);
  return block;
}

void* allocate(size_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t capacity = (bytes + kGrain - 1) / kGrain * kGrain;
  Block block = take(p, capacity);
  if (!block.data) {
    const size_t used = p.used_bytes + capacity;
    // The sizes of a step differ, so that what serves one output often cannot serve the next: with
    // no room for idle blocks beside those in use, a few would be given back and faulted in again
    // at every step.
    const size_t limit = std::max(p.most_used_bytes, used) / 2 * 3;
    while (!p.idle.empty() && used + p.idle_bytes > limit) drop(p, 0);
    block = {take_pages(capacity), capacity};
  }
  p.in_use.emplace(block.data, block.capacity);
  p.used_bytes += block.capacity;
  p.most_used_bytes = std::max(p.most_used_bytes, p.used_bytes);
  return block.data;
}

void release(void* data) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto entry = p.in_use.find(data);
  const size_t capacity = entry->second;
  p.in_use.erase(entry);
  p.used_bytes -= capacity;
  if (!kReuse) return give_pages_back(data, capacity);
  p.idle.push_back({data, capacity});
  p.idle_bytes += capacity;
}

}  // namespace

torch::stable::Tensor new_output(std::initializer_list<int64_t> sizes,
                                 torch::headeronly::ScalarType dtype, size_t element_size) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1, bytes = 0;
  bool fits = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = elements;
    fits &= !__builtin_mul_overflow(elements, sizes.begin()[i], &elements);
  }
  fits &= !__builtin_mul_overflow(elements, static_cast<int64_t>(element_size), &bytes);
  STD_TORCH_CHECK(fits, "the output must have less than 2^63 bytes");
  bytes = std::max<int64_t>(1, bytes);
  void* data = allocate(bytes);
  if (poison) std::memset(data, 0xFF, bytes);
  return torch::stable::from_blob(
      data, {sizes.begin(), sizes.size()}, {strides.data(), strides.size()},
      torch::stable::Device(torch::headeronly::DeviceType::CPU, -1), dtype, release);
}

size_t clear_output_pool() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t bytes = p.idle_bytes;
  while (!p.idle.empty()) drop(p, p.idle.size() - 1);
  p.most_used_bytes = p.used_bytes;
  return bytes;
}

void poison_outputs(bool on) { poison = on; }

}  // namespace lasem_fast
