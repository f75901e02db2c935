// The linear kernels for float32 compiled for AVX-512 (F, BW, DQ, VL).
#include "linear.h"

#define LASEM_ISA avx512
#define LASEM_ISA_AVX512
#include "isa_begin.h"
#include "simd.h"
#include "gemm.h"
#include "transpose.h"
#include "linear_kernels.h"

namespace lasem_fast {
const LinearKernels kLinearAvx512 = {avx512::make_plan, avx512::pack,      avx512::forward,
                                     avx512::runs,      avx512::pack_back, avx512::backward,
                                     avx512::finish};
}  // namespace lasem_fast

#include "isa_end.h"
