// Which instruction set the float32 kernels use.
#pragma once

#include "level.h"

namespace lasem_fast {

// "avx512", "avx2", or "" where float32 has no kernels; then isa_reason() says why.
const char* isa_name();
const char* isa_reason();

// Forces "avx2" or "avx512"; "" goes back to the choice made at start. False: this CPU cannot.
bool force_isa(const char* name);

// Null where isa_name() is "".
const LevelKernels* float_kernels();

}  // namespace lasem_fast
