// The linear kernels for float32 compiled for AVX2 and FMA.
#include "linear.h"

#define LASEM_ISA avx2
#define LASEM_ISA_AVX2
#include "isa_begin.h"
#include "simd.h"
#include "gemm.h"
#include "transpose.h"
#include "linear_kernels.h"

namespace lasem_fast {
const LinearKernels kLinearAvx2 = {avx2::make_plan, avx2::pack,     avx2::forward, avx2::runs,
                                   avx2::pack_back, avx2::backward, avx2::finish};
}  // namespace lasem_fast

#include "isa_end.h"
