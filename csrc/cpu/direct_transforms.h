// The direct algorithm in the frame of the Winograd one: a tile of m x m outputs whose "transforms"
// are the identity and whose rows are gathered 3 x 3 x C patches. Exact products, for few input
// channels.

namespace lasem_fast {
namespace LASEM_ISA {

template <int kM>
struct Direct {
  static constexpr bool kDirect = true;
  static constexpr int kTile = kM, kFilter = 3, kPoints = kM, kInset = 0;

  LASEM_INLINE void output(const Vec (&m)[kM], Vec (&y)[kM]) {
    for (int i = 0; i < kM; ++i) y[i] = m[i];
  }
  LASEM_INLINE void output_grad(const Vec (&y)[kM], Vec (&m)[kM]) {
    for (int i = 0; i < kM; ++i) m[i] = y[i];
  }
};

LASEM_INLINE void copy_run(Scalar* to, const Scalar* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_some(to + i, load_some(from + i, n - i), n - i);
}
LASEM_INLINE void zero_run(Scalar* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_some(to + i, zero(), n - i);
}
LASEM_INLINE void add_run(Scalar* to, const Scalar* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_some(to + i, add(load_some(to + i, n - i), load_some(from + i, n - i)), n - i);
}

// Calls run(image offset or -1 for zeros, patch offset, length) for the patch of one output pixel.
template <int kFilter, class Run>
LASEM_INLINE void for_patch_runs(const LevelShape& s, int64_t iy, int64_t ix, const Run& run) {
  const int64_t c = s.in_channels;
  for (int64_t ky = 0; ky < kFilter; ++ky) {
    const int64_t row = iy + ky, patch = ky * kFilter * c;
    if (row < 0 || row >= s.height) {
      run(-1, patch, kFilter * c);
    } else if (ix >= 0 && ix + kFilter <= s.width) {
      run((row * s.width + ix) * c, patch, kFilter * c);
    } else {
      for (int64_t kx = 0; kx < kFilter; ++kx) {
        const int64_t col = ix + kx;
        run(col < 0 || col >= s.width ? -1 : (row * s.width + col) * c, patch + kx * c, c);
      }
    }
  }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
