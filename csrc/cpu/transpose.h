// Matrices transposed by squares of kLanes vectors.

namespace lasem_fast {
namespace LASEM_ISA {

// v[i][j] <-> v[j][i]: each perfect shuffle of the rows moves one bit of the row into the lane.
LASEM_INLINE void transpose_square(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int n = 1; n < kLanes; n *= 2) {
    Vec t[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(v[i], v[i + kLanes / 2], &t[2 * i], &t[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = t[i];
  }
}

// to[j][i] = from[i][j] for i < rows, j < columns.
static inline void transpose(int64_t rows, int64_t columns, const Scalar* from, int64_t from_stride,
                             Scalar* to, int64_t to_stride) {
  if ((rows == 1 && to_stride == 1) || (columns == 1 && from_stride == 1)) {
    memcpy(to, from, sizeof(Scalar) * rows * columns);
    return;
  }
  for (int64_t i0 = 0; i0 < rows; i0 += kLanes)
    for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
      const Scalar* in = from + i0 * from_stride + j0;
      Scalar* out = to + j0 * to_stride + i0;
      const int64_t m = rows - i0, n = columns - j0;
      Vec v[kLanes];
      if (m >= kLanes && n >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load(in + i * from_stride);
        transpose_square(v);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(out + j * to_stride, v[j]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = i < m ? load_some(in + i * from_stride, n) : zero();
        transpose_square(v);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
          if (j < n) store_some(out + j * to_stride, v[j], m);
      }
    }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
