// AVX-512 in AVX2, so that the kernels' AVX-512 forms run where no CPU has it: SIMDe's functions
// under Intel's names, and those that SIMDe 0.7.4 lacks, lane by lane.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <stdint.h>
#include <string.h>

namespace lasem_fast::emulated {

inline __mmask16 cmplt(__m128i a, __m128i b) {
  // no unsigned comparison: a < b where a is the smaller one and not b
  const __m128i smaller = _mm_cmpeq_epi8(_mm_min_epu8(a, b), a), equal = _mm_cmpeq_epi8(a, b);
  return static_cast<__mmask16>(_mm_movemask_epi8(_mm_andnot_si128(equal, smaller)));
}

inline __mmask16 cmpeq(__m128i a, __m128i b) {
  return static_cast<__mmask16>(_mm_movemask_epi8(_mm_cmpeq_epi8(a, b)));
}

inline __m128i move(__m128i no, __mmask16 lanes, __m128i yes) {
  uint8_t bytes[16], others[16];
  memcpy(bytes, &no, sizeof bytes);
  memcpy(others, &yes, sizeof others);
  for (int i = 0; i < 16; ++i)
    if (lanes >> i & 1) bytes[i] = others[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

inline __m512 load(__mmask16 lanes, const float* p) {
  float values[16] = {};
  for (int i = 0; i < 16; ++i)
    if (lanes >> i & 1) values[i] = p[i];
  return _mm512_loadu_ps(values);
}

inline void store(float* p, __mmask16 lanes, __m512 v) {
  float values[16];
  _mm512_storeu_ps(values, v);
  for (int i = 0; i < 16; ++i)
    if (lanes >> i & 1) p[i] = values[i];
}

// Unlike a store, it faults where the address is not aligned.
inline void stream(float* p, __m512 v) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
  _mm512_storeu_ps(p, v);
}

inline __m128i load_bytes(__mmask16 lanes, const void* p) {
  uint8_t bytes[16] = {};
  for (int i = 0; i < 16; ++i)
    if (lanes >> i & 1) bytes[i] = static_cast<const uint8_t*>(p)[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

inline void store_bytes(void* p, __mmask16 lanes, __m128i v) {
  uint8_t bytes[16];
  memcpy(bytes, &v, sizeof bytes);
  for (int i = 0; i < 16; ++i)
    if (lanes >> i & 1) static_cast<uint8_t*>(p)[i] = bytes[i];
}

}  // namespace lasem_fast::emulated

// immintrin.h, which SIMDe includes, has functions of these names that need the instructions.
#define _mm_cmplt_epu8_mask ::lasem_fast::emulated::cmplt
#define _mm_cmpeq_epi8_mask ::lasem_fast::emulated::cmpeq
#define _mm_mask_mov_epi8 ::lasem_fast::emulated::move
#define _mm_maskz_loadu_epi8 ::lasem_fast::emulated::load_bytes
#define _mm_mask_storeu_epi8 ::lasem_fast::emulated::store_bytes
#define _mm512_maskz_loadu_ps ::lasem_fast::emulated::load
#define _mm512_mask_storeu_ps ::lasem_fast::emulated::store
#define _mm512_stream_ps ::lasem_fast::emulated::stream
