// Closes what isa_begin.h opened.
#if defined(__clang__) && (defined(LASEM_ISA_AVX512) || defined(LASEM_ISA_AVX2))
#pragma clang attribute pop
#endif
