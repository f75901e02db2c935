// The linear kernels for float64, without special instructions: for gradcheck and tests.
#include "linear.h"

#define LASEM_ISA portable
#define LASEM_ISA_PORTABLE
#include "isa_begin.h"
#include "simd.h"
#include "gemm.h"
#include "transpose.h"
#include "linear_kernels.h"

namespace lasem_fast {
const LinearKernels kLinearDouble = {portable::make_plan, portable::pack,      portable::forward,
                                     portable::runs,      portable::pack_back, portable::backward,
                                     portable::finish};
}  // namespace lasem_fast

#include "isa_end.h"
