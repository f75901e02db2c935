// Scratch memory that outlives a call, so that a training step does not pay for its page faults
// twice.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lasem_fast {

// A block of at least `bytes`, 64-byte aligned, exclusive to its owner until destroyed.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  size_t capacity_;
};

// Lays out parts of one scratch block, each on a cache line of its own.
class Layout {
 public:
  explicit Layout(size_t scalar) : scalar_(scalar) {}
  size_t add(int64_t elements) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(elements) * scalar_ + 127) / 128 * 128;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t scalar_, bytes_ = 0;
};

// Frees the blocks that no call is using; returns their size in bytes.
size_t clear_scratch();

}  // namespace lasem_fast
