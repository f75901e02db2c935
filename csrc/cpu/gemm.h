// Register-blocked matrix products over panels of kPanel columns.

namespace lasem_fast {
namespace LASEM_ISA {

// c[i][:] (+)= sum_k a(i, k) * b[k][:] for kM rows and one panel; a(i, k) = a[i * ai + k * ak].
template <int kM, bool kAdd>
static inline void micro(int64_t depth, const Scalar* __restrict a, int64_t ai, int64_t ak,
                         const Scalar* __restrict b, int64_t ldb, Scalar* __restrict c,
                         int64_t ldc) {
  Vec acc[kM][2];
  // The rows of c lie too far apart for the hardware to fetch them ahead of the addition.
  if constexpr (kAdd) {
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i)
      for (int byte = 0; byte < kPanel * static_cast<int>(sizeof(Scalar)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(c + i * ldc) + byte, 1);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
    acc[i][0] = zero();
    acc[i][1] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const Vec s = broadcast(a + i * ai);
      acc[i][0] = fma(s, b0, acc[i][0]);
      acc[i][1] = fma(s, b1, acc[i][1]);
    }
    a += ak;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
    // Adding at the end, not at the start, rounds less: a sum of the sums of blocks.
    for (int h = 0; h < 2; ++h) {
      Scalar* to = c + i * ldc + h * kLanes;
      store(to, kAdd ? add(load(to), acc[i][h]) : acc[i][h]);
    }
  }
}

template <int kM, bool kAdd>
static void micro_tail(int64_t rows, int64_t depth, const Scalar* a, int64_t ai, int64_t ak,
                       const Scalar* b, int64_t ldb, Scalar* c, int64_t ldc) {
  if constexpr (kM > 0) {
    if (rows == kM) return micro<kM, kAdd>(depth, a, ai, ak, b, ldb, c, ldc);
    micro_tail<kM - 1, kAdd>(rows, depth, a, ai, ak, b, ldb, c, ldc);
  }
}

// c [rows, panel] (+)= a [rows, depth] * b [depth, panel], a row-major.
template <bool kAdd>
static void gemm_panel(int64_t rows, int64_t depth, const Scalar* a, int64_t lda, const Scalar* b,
                       Scalar* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    micro<kRows, kAdd>(depth, a + i * lda, lda, 1, b, kPanel, c + i * ldc, ldc);
  micro_tail<kRows - 1, kAdd>(rows - i, depth, a + i * lda, lda, 1, b, kPanel, c + i * ldc, ldc);
}

// c [depth, panel] (+)= a' b for a [rows, depth], b [rows, panel].
template <bool kAdd>
static void gemm_transposed(int64_t rows, int64_t depth, const Scalar* a, int64_t lda,
                            const Scalar* b, int64_t ldb, Scalar* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + kRows <= depth; i += kRows)
    micro<kRows, kAdd>(rows, a + i, 1, lda, b, ldb, c + i * ldc, ldc);
  micro_tail<kRows - 1, kAdd>(depth - i, rows, a + i, 1, lda, b, ldb, c + i * ldc, ldc);
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
