// The batch-norm kernels for float32 compiled for AVX2 and FMA.
#include "norm.h"

#define LASEM_ISA avx2
#define LASEM_ISA_AVX2
#include "isa_begin.h"
#include "simd.h"
#include "norm_kernels.h"

namespace lasem_fast {
const NormKernels kNormAvx2 = {avx2::moments, avx2::norm_forward, avx2::gradient_sums,
                               avx2::norm_backward};
}  // namespace lasem_fast

#include "isa_end.h"
