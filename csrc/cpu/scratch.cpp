#include "scratch.h"

#include <mutex>
#include <vector>

#include "pages.h"

namespace lasem_fast {
namespace {

struct Block {
  void* data;
  size_t capacity;
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kPage = 64;  // no slack, so that AddressSanitizer sees the end of a block
#else
constexpr size_t kPage = size_t{2} << 20;
#endif

std::mutex mutex;

std::vector<Block>& idle() {
  // Never destroyed: a call on another thread may end after static destruction has begun.
  static auto* blocks = new std::vector<Block>();
  return *blocks;
}

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), capacity_(0) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& blocks = idle();
    if (!blocks.empty()) {
      data_ = blocks.back().data;
      capacity_ = blocks.back().capacity;
      blocks.pop_back();
    }
  }
  if (capacity_ >= bytes && data_) return;
  give_pages_back(data_, capacity_);
  // Whole huge pages: the transforms write one cache line to each of 36 batches in turn, and small
  // pages would miss the TLB.
  const size_t capacity = (bytes + kPage - 1) / kPage * kPage;
  data_ = take_pages(capacity);
  capacity_ = capacity;
}

Scratch::~Scratch() {
  const std::lock_guard<std::mutex> lock(mutex);
  try {
    idle().push_back({data_, capacity_});
  } catch (...) {
    give_pages_back(data_, capacity_);
  }
}

size_t clear_scratch() {
  const std::lock_guard<std::mutex> lock(mutex);
  size_t bytes = 0;
  for (const Block& block : idle()) {
    bytes += block.capacity;
    give_pages_back(block.data, block.capacity);
  }
  idle().clear();
  return bytes;
}

}  // namespace lasem_fast
