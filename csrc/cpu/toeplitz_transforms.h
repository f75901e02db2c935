// Images of 2 x 2 pixels or fewer with padding 1. Of what F(2 x 2, 3 x 3) reads, the border is all
// zeros. In one dimension (y0, y1) is then a Toeplitz matrix [w1 w2; w0 w1] times (x0, x1), which
// takes three products, not four: y0 = (w1 + w2) x1 + w1 (x0 - x1), y1 = (w0 + w1) x0 - w1 (x0 -
// x1). The difference of the pixels, not their sum, because behind a ReLU it is the smaller one.

namespace lasem_fast {
namespace LASEM_ISA {

struct Toeplitz {
  static constexpr bool kDirect = false;
  static constexpr int kTile = 2, kFilter = 3, kPoints = 3, kPatch = 2, kInset = 1;
  static constexpr double kG[3][3] = {{0, 1, 1}, {0, 1, 0}, {1, 1, 0}};

  LASEM_INLINE void input(const Vec (&d)[2], Vec (&v)[3]) {
    v[0] = d[1];
    v[1] = sub(d[0], d[1]);
    v[2] = d[0];
  }
  LASEM_INLINE void input_grad(const Vec (&v)[3], Vec (&d)[2]) {
    d[0] = add(v[1], v[2]);
    d[1] = sub(v[0], v[1]);
  }
  LASEM_INLINE void output(const Vec (&m)[3], Vec (&y)[2]) {
    y[0] = add(m[0], m[1]);
    y[1] = sub(m[2], m[1]);
  }
  LASEM_INLINE void output_grad(const Vec (&y)[2], Vec (&m)[3]) {
    m[0] = y[0];
    m[1] = sub(y[0], y[1]);
    m[2] = y[1];
  }
};

}  // namespace LASEM_ISA
}  // namespace lasem_fast
