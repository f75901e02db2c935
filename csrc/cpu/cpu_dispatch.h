// Which kernels run: the instruction set of float32, and the portable ones of float64.
#pragma once

#include "level.h"
#include "linear.h"
#include "norm.h"
#include "stable_torch.h"

namespace lasem_fast {

// "avx512", "avx2", or "" where float32 has no kernels; then isa_reason() says why.
const char* isa_name();
const char* isa_reason();

// Forces "avx2" or "avx512"; "" goes back to the choice made at start. False: this CPU cannot.
bool force_isa(const char* name);

// The kernels of one instruction set.
struct Kernels {
  const LevelKernels& level;
  const LinearKernels& linear;
  const NormKernels& norm;
};

// Those of float32 or float64; an error where isa_name() is "" and float32 has none.
const Kernels& kernels_for(torch::headeronly::ScalarType dtype);

}  // namespace lasem_fast
