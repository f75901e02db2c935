// The batch-norm kernels for float64, without special instructions: for gradcheck and tests.
#include "norm.h"

#define LASEM_ISA portable
#define LASEM_ISA_PORTABLE
#include "isa_begin.h"
#include "simd.h"
#include "norm_kernels.h"

namespace lasem_fast {
const NormKernels kNormDouble = {portable::moments, portable::norm_forward, portable::gradient_sums,
                                 portable::norm_backward};
}  // namespace lasem_fast

#include "isa_end.h"
