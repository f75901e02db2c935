// Opens a translation unit that is compiled for one instruction set. No include guard: each kernel
// unit includes it once, after its contract and after defining LASEM_ISA (the namespace) and one
// LASEM_ISA_* selector.
// Standard library templates stay out of these units: an inline function instantiated here with
// wide instructions could be the copy that the linker keeps for the whole extension.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(LASEM_ISA_AVX512) && defined(LASEM_EMULATE_AVX512)  // make test-avx512
#include "emulated_avx512.h"
#elif defined(LASEM_ISA_AVX512)
#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#endif
#elif defined(LASEM_ISA_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#endif
