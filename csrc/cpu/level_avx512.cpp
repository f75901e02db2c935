// The level kernels for float32 compiled for AVX-512 (F, BW, DQ, VL).
#include "level.h"

#define LASEM_ISA avx512
#define LASEM_ISA_AVX512
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
const LevelKernels kLevelAvx512 = {avx512::make_plan,
                                   avx512::run_pack,
                                   avx512::run_forward,
                                   avx512::run_pack_back,
                                   avx512::run_backward,
                                   avx512::run_finish,
                                   avx512::run_gather_inputs,
                                   avx512::run_forward_panel,
                                   avx512::run_gather_both,
                                   avx512::run_weight_grad_panel,
                                   avx512::run_input_grad_panel,
                                   avx512::run_add_input_grads,
                                   avx512::skip_gradient};
}  // namespace lasem_fast

#include "isa_end.h"
