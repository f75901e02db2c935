// One vector type per instruction set. Included only between isa_begin.h and isa_end.h.
// Vec: kLanes scalars. Code: one small integer per lane (stored as uint8). Mask: one truth per
// lane. wins: v is larger than the best so far, or NaN. opens: v passes a ReLU, being larger than 0
// or NaN. code_open: the convolution gets the gradient. code_position: of the window, or none.
// stream: a store past the caches to an aligned address, ended by stream_end. interleave: the
// lanes of a and b in turn, the first half of them and the second.

// The code of an output is the position in its window that gets the gradient, kClosed on top where
// the convolution's own ReLU was closed there, so that only what was added behind it does; kNothing
// where nothing passes.

#define LASEM_INLINE static inline __attribute__((always_inline))

namespace lasem_fast {
namespace LASEM_ISA {

constexpr int kClosed = 16, kNothing = 255;

#if defined(LASEM_ISA_AVX512)

using Scalar = float;
using Vec = __m512;
using Code = __m128i;
using Mask = __mmask16;
constexpr int kLanes = 16;
constexpr int kRows = 8;   // micro-kernel rows: 2 x 8 accumulators cover the FMA latency
constexpr int kSums = 28;  // accumulators that leave registers for a factor

LASEM_INLINE __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
LASEM_INLINE Vec zero() { return _mm512_setzero_ps(); }
LASEM_INLINE Vec splat(double s) { return _mm512_set1_ps(static_cast<float>(s)); }
LASEM_INLINE Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
LASEM_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
LASEM_INLINE Vec load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
LASEM_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
LASEM_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
LASEM_INLINE void stream_end() { _mm_sfence(); }
LASEM_INLINE void store_n(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
LASEM_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
LASEM_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
LASEM_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
LASEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
LASEM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
LASEM_INLINE Mask wins(Vec v, Vec best) {
  return _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
}
LASEM_INLINE Mask opens(Vec v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NLE_UQ); }
LASEM_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_mov_ps(no, m, yes); }
LASEM_INLINE Vec keep(Mask m, Vec v) { return _mm512_maskz_mov_ps(m, v); }
LASEM_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *low = _mm512_permutex2var_ps(a, lower, b);
  *high = _mm512_permutex2var_ps(a, _mm512_add_epi32(lower, _mm512_set1_epi32(8)), b);
}
LASEM_INLINE Code code_splat(int c) { return _mm_set1_epi8(static_cast<char>(c)); }
LASEM_INLINE Code code_select(Mask m, Code yes, Code no) { return _mm_mask_mov_epi8(no, m, yes); }
LASEM_INLINE Mask code_is(Code c, int value) { return _mm_cmpeq_epi8_mask(c, code_splat(value)); }
LASEM_INLINE Mask code_open(Code c) { return _mm_cmplt_epu8_mask(c, code_splat(kClosed)); }
LASEM_INLINE Code code_position(Code c) {
  return code_select(code_is(c, kNothing), c, _mm_and_si128(c, code_splat(kClosed - 1)));
}
LASEM_INLINE Code code_load(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
LASEM_INLINE Code code_load_n(const uint8_t* p, int64_t n) {
  return _mm_maskz_loadu_epi8(lanes(n), p);
}
LASEM_INLINE void code_store(uint8_t* p, Code c) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), c);
}
LASEM_INLINE void code_store_n(uint8_t* p, Code c, int64_t n) {
  _mm_mask_storeu_epi8(p, lanes(n), c);
}

#elif defined(LASEM_ISA_AVX2)

using Scalar = float;
using Vec = __m256;
using Code = __m256i;
using Mask = __m256;
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 2 x 6 accumulators, two columns and one broadcast fit 16 registers
constexpr int kSums = 12;

LASEM_INLINE __m256i lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LASEM_INLINE Vec zero() { return _mm256_setzero_ps(); }
LASEM_INLINE Vec splat(double s) { return _mm256_set1_ps(static_cast<float>(s)); }
LASEM_INLINE Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
LASEM_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
LASEM_INLINE Vec load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes(n)); }
LASEM_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
LASEM_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
LASEM_INLINE void stream_end() { _mm_sfence(); }
LASEM_INLINE void store_n(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, lanes(n), v); }
LASEM_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
LASEM_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
LASEM_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
LASEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LASEM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
LASEM_INLINE Mask wins(Vec v, Vec best) {
  return _mm256_or_ps(_mm256_cmp_ps(v, best, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}
LASEM_INLINE Mask opens(Vec v) { return _mm256_cmp_ps(v, zero(), _CMP_NLE_UQ); }
LASEM_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
LASEM_INLINE Vec keep(Mask m, Vec v) { return _mm256_and_ps(m, v); }
LASEM_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
  const Vec even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  *low = _mm256_permute2f128_ps(even, odd, 0x20);
  *high = _mm256_permute2f128_ps(even, odd, 0x31);
}
LASEM_INLINE Code code_splat(int c) { return _mm256_set1_epi32(c); }
LASEM_INLINE Code code_select(Mask m, Code yes, Code no) {
  return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m));
}
LASEM_INLINE Mask code_is(Code c, int value) {
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(c, _mm256_set1_epi32(value)));
}
LASEM_INLINE Mask code_open(Code c) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(kClosed), c));
}
LASEM_INLINE Code code_position(Code c) {
  const __m256i nothing = _mm256_cmpeq_epi32(c, _mm256_set1_epi32(kNothing));
  return _mm256_or_si256(nothing, _mm256_and_si256(c, _mm256_set1_epi32(kClosed - 1)));
}
LASEM_INLINE Code code_load(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
LASEM_INLINE Code code_load_n(const uint8_t* p, int64_t n) {
  uint8_t bytes[8] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return code_load(bytes);
}
LASEM_INLINE void code_store(uint8_t* p, Code c) {
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
LASEM_INLINE void code_store_n(uint8_t* p, Code c, int64_t n) {
  uint8_t bytes[8];
  code_store(bytes, c);
  for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
}

#else  // portable: float64, for tests and gradcheck

using Scalar = double;
constexpr int kLanes = 2;
constexpr int kRows = 4;
constexpr int kSums = 12;
typedef double Vec __attribute__((vector_size(16)));
typedef int64_t Code __attribute__((vector_size(16)));
using Mask = Code;

LASEM_INLINE Vec zero() { return Vec{0.0, 0.0}; }
LASEM_INLINE Vec splat(double s) { return Vec{s, s}; }
LASEM_INLINE Vec broadcast(const double* p) { return Vec{*p, *p}; }
LASEM_INLINE Vec load(const double* p) { return Vec{p[0], p[1]}; }
LASEM_INLINE Vec load_n(const double* p, int64_t n) { return Vec{p[0], n > 1 ? p[1] : 0.0}; }
LASEM_INLINE void store_n(double* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
LASEM_INLINE void store(double* p, Vec v) { store_n(p, v, kLanes); }
LASEM_INLINE void stream(double* p, Vec v) { store(p, v); }
LASEM_INLINE void stream_end() {}
LASEM_INLINE Vec add(Vec a, Vec b) { return a + b; }
LASEM_INLINE Vec sub(Vec a, Vec b) { return a - b; }
LASEM_INLINE Vec mul(Vec a, Vec b) { return a * b; }
LASEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
LASEM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
LASEM_INLINE Mask wins(Vec v, Vec best) { return (v > best) | (v != v); }
LASEM_INLINE Mask opens(Vec v) { return ~(v <= zero()); }
LASEM_INLINE Code code_select(Mask m, Code yes, Code no) { return (yes & m) | (no & ~m); }
LASEM_INLINE Vec keep(Mask m, Vec v) { return (Vec)((Code)v & m); }
LASEM_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
  *low = Vec{a[0], b[0]};
  *high = Vec{a[1], b[1]};
}
LASEM_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return (Vec)code_select(m, (Code)yes, (Code)no);
}
LASEM_INLINE Code code_splat(int c) { return Code{c, c}; }
LASEM_INLINE Mask code_is(Code c, int value) { return c == code_splat(value); }
LASEM_INLINE Mask code_open(Code c) { return c < code_splat(kClosed); }
LASEM_INLINE Code code_position(Code c) {
  return (c == code_splat(kNothing)) | (c & code_splat(kClosed - 1));
}
LASEM_INLINE Code code_load(const uint8_t* p) { return Code{p[0], p[1]}; }
LASEM_INLINE Code code_load_n(const uint8_t* p, int64_t n) {
  return Code{p[0], n > 1 ? p[1] : 255};
}
LASEM_INLINE void code_store_n(uint8_t* p, Code c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(c[i]);
}
LASEM_INLINE void code_store(uint8_t* p, Code c) { code_store_n(p, c, kLanes); }

#endif

constexpr int kPanel = 2 * kLanes;  // columns of a micro-kernel

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Fetches the lines of `bytes` bytes. Its callers are always inlined as well: GCC takes a function
// of prefetches alone for one without effects, and drops its calls.
LASEM_INLINE void prefetch_run(const void* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b);
}
LASEM_INLINE Vec load_some(const Scalar* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}
LASEM_INLINE void store_some(Scalar* p, Vec v, int64_t n) {
  n >= kLanes ? store(p, v) : store_n(p, v, n);
}
LASEM_INLINE bool any_nonzero(const Scalar* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] != 0) return true;
  return false;
}
LASEM_INLINE Code code_load_some(const uint8_t* p, int64_t n) {
  return n >= kLanes ? code_load(p) : code_load_n(p, n);
}
LASEM_INLINE void code_store_some(uint8_t* p, Code c, int64_t n) {
  n >= kLanes ? code_store(p, c) : code_store_n(p, c, n);
}


// Takes position t of a window into what passes of it so far: v, through a ReLU where there is one,
// and what is added to it, if anything. The first maximum wins, and NaN, as in PyTorch. With a ReLU
// behind the sum a window `starts` not with its first value but with zero() and kNothing.
LASEM_INLINE void take(Vec& best, Code& code, bool& starts, int t, Vec v, bool relu,
                       const Scalar* added, int64_t lanes) {
  Code own = code_splat(t);
  if (relu) {
    const Mask open = opens(v);
    v = keep(open, v);
    own = code_select(open, own, code_splat(t + kClosed));
  }
  if (added) v = add(v, load_some(added, lanes));
  if (starts) {
    best = v;
    code = own;
    starts = false;
    return;
  }
  const Mask m = wins(v, best);
  best = select(m, v, best);
  code = code_select(m, own, code);
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
