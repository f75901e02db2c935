// The level kernels for float64, without special instructions: for gradcheck and tests.
#include "level.h"

#define LASEM_ISA portable
#define LASEM_ISA_PORTABLE
#include "isa_begin.h"
#include "simd.h"
#include "gemm.h"
#include "transpose.h"
#include "direct_transforms.h"
#include "winograd_transforms.h"
#include "toeplitz_transforms.h"
#include "level_plan.h"
#include "weight_transforms.h"
#include "level_forward.h"
#include "window_weight_grad.h"
#include "level_backward.h"
#include "weight_stationary.h"
#include "skip_gradient.h"
#include "level_kernels.h"

namespace lasem_fast {
const LevelKernels kLevelDouble = {portable::make_plan,
                                   portable::run_pack,
                                   portable::run_forward,
                                   portable::run_pack_back,
                                   portable::run_backward,
                                   portable::run_finish,
                                   portable::run_gather_inputs,
                                   portable::run_forward_panel,
                                   portable::run_gather_both,
                                   portable::run_weight_grad_panel,
                                   portable::run_input_grad_panel,
                                   portable::run_add_input_grads,
                                   portable::skip_gradient};
}  // namespace lasem_fast

#include "isa_end.h"
