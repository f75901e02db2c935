// Memory of output tensors, given back to a pool when the tensor dies: a training step makes the
// same tensors again and again, and fresh memory costs a page fault every 4 KiB.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "stable_torch.h"

namespace lasem_fast {

// An uninitialised contiguous tensor on the CPU. All pooled memory together, in tensors and idle,
// stays below 1.5 times the most that tensors have held at one time.
torch::stable::Tensor new_output(std::initializer_list<int64_t> sizes,
                                 torch::headeronly::ScalarType dtype, size_t element_size);

// Frees the idle memory of the pool; returns its size in bytes.
size_t clear_output_pool();

// Whether new outputs are filled with 0xFF bytes (NaN), so that tests see what is not written.
void poison_outputs(bool poison);

}  // namespace lasem_fast
