// Closes what isa_begin.h opened.
#if defined(__clang__) && (defined(LASEM_ISA_AVX2) || \
                           (defined(LASEM_ISA_AVX512) && !defined(LASEM_EMULATE_AVX512)))
#pragma clang attribute pop
#endif
