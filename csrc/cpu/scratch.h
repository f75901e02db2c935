// Scratch memory that outlives a call, so that a training step does not pay for its page faults
// twice.
#pragma once

#include <cstddef>

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

// Frees the blocks that no call is using; returns their size in bytes.
size_t clear_scratch();

}  // namespace lasem_fast
