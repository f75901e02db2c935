// The level kernels for float32 compiled for AVX2 and FMA.
#include "level.h"

#define LASEM_ISA avx2
#define LASEM_ISA_AVX2
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
const LevelKernels kLevelAvx2 = {avx2::make_plan,
                                 avx2::run_pack,
                                 avx2::run_forward,
                                 avx2::run_pack_back,
                                 avx2::run_backward,
                                 avx2::run_finish,
                                 avx2::run_gather_inputs,
                                 avx2::run_forward_panel,
                                 avx2::run_gather_both,
                                 avx2::run_weight_grad_panel,
                                 avx2::run_input_grad_panel,
                                 avx2::run_add_input_grads,
                                 avx2::skip_gradient};
}  // namespace lasem_fast

#include "isa_end.h"
