// Argument checks shared by the operators; messages name the argument, what was expected and what
// was given.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string_view>

#include "stable_torch.h"

namespace lasem_fast {

inline void check_tensor(const torch::stable::Tensor& t, std::string_view name,
                         torch::headeronly::ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  if (same) return;
  std::ostringstream expected, got;
  for (int64_t n : shape) expected << n << ", ";
  for (int64_t n : sizes) got << n << ", ";
  STD_TORCH_CHECK(false, name, " must have shape (", expected.str(), "), got (", got.str(), ")");
}

inline void check_float(const torch::stable::Tensor& t, const char* name) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == torch::headeronly::ScalarType::Float ||
                      dtype == torch::headeronly::ScalarType::Double,
                  name, " must have dtype float32 or float64, got ",
                  torch::headeronly::toString(dtype));
}

}  // namespace lasem_fast
