// The batch-norm kernels for float32 compiled for AVX-512.
#include "norm.h"

#define LASEM_ISA avx512
#define LASEM_ISA_AVX512
#include "isa_begin.h"
#include "simd.h"
#include "norm_kernels.h"

namespace lasem_fast {
const NormKernels kNormAvx512 = {avx512::moments, avx512::norm_forward, avx512::gradient_sums,
                               avx512::norm_backward};
}  // namespace lasem_fast

#include "isa_end.h"
