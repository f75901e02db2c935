// F(m x m, r x r) in one dimension: y = A' [(G g) * (B' d)], and the transposes that differentiate
// it. With interpolation points a_i (Toom-Cook, transposed): row k of A' holds a_i^k, row i of G is
// f_i (1, a_i, .., a_i^(r-1)), row i of B' the coefficients of the product over j != i of (x -
// a_j), divided by f_i times the product over j != i of (a_i - a_j); infinity gives the highest
// powers only, and row inf of B' the product over all j of (x - a_j). Any f_i will do. Points were
// chosen for rounding error: 0, +-sqrt(1/2), +-sqrt(2), inf where there are six and 0,
// +-3/4, 2, inf where there are five have about half the error of the usual integer points.

namespace lasem_fast {
namespace LASEM_ISA {

// The shape of an algorithm: a tile is made of a patch of kPatch x kPatch pixels, which begins
// kInset pixels inside what its outputs see; kPoints, so as many batches per dimension.
template <int kM, int kR>
struct WinogradShape {
  static constexpr bool kDirect = false;
  static constexpr int kTile = kM, kFilter = kR, kPoints = kM + kR - 1;
  static constexpr int kPatch = kPoints, kInset = 0;
};

template <int kM, int kR>
struct Winograd;

template <>
struct Winograd<2, 3> : WinogradShape<2, 3> {
  static constexpr double kG[4][3] = {{-1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

  LASEM_INLINE void input(const Vec (&d)[4], Vec (&v)[4]) {
    v[0] = sub(d[2], d[0]);
    v[1] = add(d[2], d[1]);
    v[2] = sub(d[2], d[1]);
    v[3] = sub(d[3], d[1]);
  }
  LASEM_INLINE void input_grad(const Vec (&v)[4], Vec (&d)[4]) {
    d[0] = sub(zero(), v[0]);
    d[1] = sub(sub(v[1], v[2]), v[3]);
    d[2] = add(add(v[1], v[2]), v[0]);
    d[3] = v[3];
  }
  LASEM_INLINE void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = add(add(m[1], m[2]), m[0]);
    y[1] = add(sub(m[1], m[2]), m[3]);
  }
  LASEM_INLINE void output_grad(const Vec (&y)[2], Vec (&m)[4]) {
    m[0] = y[0];
    m[1] = add(y[0], y[1]);
    m[2] = sub(y[0], y[1]);
    m[3] = y[1];
  }
};

template <>
struct Winograd<3, 3> : WinogradShape<3, 3> {
  static constexpr double kG[5][3] = {{8.0 / 9, 0, 0},
                                      {-32.0 / 45, -24.0 / 45, -18.0 / 45},
                                      {-32.0 / 99, 24.0 / 99, -18.0 / 99},
                                      {8.0 / 55, 16.0 / 55, 32.0 / 55},
                                      {0, 0, 1}};

  LASEM_INLINE void input(const Vec (&d)[5], Vec (&v)[5]) {
    const Vec two = splat(2), p = splat(0.75), pp = splat(0.5625);
    const Vec u0 = fnma(two, d[0], d[1]), u1 = fnma(two, d[1], d[2]);
    const Vec u2 = fnma(two, d[2], d[3]), u3 = fnma(two, d[3], d[4]);
    v[0] = fnma(pp, u0, u2);
    v[1] = fma(p, u1, u2);
    v[2] = fnma(p, u1, u2);
    v[3] = fnma(pp, d[1], d[3]);
    v[4] = fnma(pp, u1, u3);
  }
  LASEM_INLINE void input_grad(const Vec (&v)[5], Vec (&d)[5]) {
    const Vec two = splat(2), p = splat(0.75), pp = splat(0.5625);
    const Vec u1 = fnma(pp, v[4], mul(p, sub(v[1], v[2])));
    const Vec u2 = add(add(v[1], v[2]), v[0]);
    d[0] = mul(splat(1.125), v[0]);
    d[1] = fnma(two, u1, fnma(pp, v[3], mul(splat(-0.5625), v[0])));
    d[2] = fnma(two, u2, u1);
    d[3] = fnma(two, v[4], add(u2, v[3]));
    d[4] = v[4];
  }
  LASEM_INLINE void output(const Vec (&m)[5], Vec (&y)[3]) {
    const Vec s = add(m[1], m[2]), d = sub(m[1], m[2]);
    y[0] = add(add(m[0], s), m[3]);
    y[1] = fma(splat(0.75), d, add(m[3], m[3]));
    y[2] = fma(splat(0.5625), s, fma(splat(4), m[3], m[4]));
  }
  LASEM_INLINE void output_grad(const Vec (&y)[3], Vec (&m)[5]) {
    const Vec even = fma(splat(0.5625), y[2], y[0]);
    m[0] = y[0];
    m[1] = fma(splat(0.75), y[1], even);
    m[2] = fnma(splat(0.75), y[1], even);
    m[3] = fma(splat(2), fma(splat(2), y[2], y[1]), y[0]);
    m[4] = y[2];
  }
};

// The order in which the rows of V are made: six at once do not fit the registers, so that they go
// in pairs, of those that share sums.
template <int kPoints>
constexpr int input_row(int i) {
  constexpr int pairs[] = {1, 2, 3, 4, 0, 5};
  return kPoints == 6 ? pairs[i] : i;
}

constexpr double kRoot = 1.41421356237309504880;

// B depends on the points alone, so all algorithms of six points share it.
struct SixPoints {
  LASEM_INLINE void input(const Vec (&d)[6], Vec (&v)[6]) {
    const Vec p = splat(kRoot / 2), q = splat(kRoot), two = splat(2), half = splat(0.5);
    const Vec even1 = fnma(two, d[2], d[4]), odd1 = fnma(two, d[1], d[3]);
    const Vec even2 = fnma(half, d[2], d[4]), odd2 = fnma(half, d[1], d[3]);
    v[0] = fnma(splat(2.5), d[2], add(d[0], d[4]));
    v[1] = fma(p, odd1, even1);
    v[2] = fnma(p, odd1, even1);
    v[3] = fma(q, odd2, even2);
    v[4] = fnma(q, odd2, even2);
    v[5] = fnma(splat(2.5), d[3], add(d[1], d[5]));
  }
  LASEM_INLINE void input_grad(const Vec (&v)[6], Vec (&d)[6]) {
    const Vec two = splat(2), half = splat(0.5), c = splat(2.5);
    const Vec s1 = add(v[1], v[2]), s2 = add(v[3], v[4]);
    const Vec o1 = mul(splat(kRoot / 2), sub(v[1], v[2]));
    const Vec o2 = mul(splat(kRoot), sub(v[3], v[4]));
    d[0] = v[0];
    d[1] = fnma(two, o1, fnma(half, o2, v[5]));
    d[2] = fnma(c, v[0], fnma(two, s1, mul(splat(-0.5), s2)));
    d[3] = fnma(c, v[5], add(o1, o2));
    d[4] = add(add(s1, s2), v[0]);
    d[5] = v[5];
  }
};

template <>
struct Winograd<4, 3> : WinogradShape<4, 3>, SixPoints {
  static constexpr double kG[6][3] = {{1, 0, 0},
                                      {-2.0 / 3, -kRoot / 3, -1.0 / 3},
                                      {-2.0 / 3, kRoot / 3, -1.0 / 3},
                                      {1.0 / 6, kRoot / 6, 1.0 / 3},
                                      {1.0 / 6, -kRoot / 6, 1.0 / 3},
                                      {0, 0, 1}};

  LASEM_INLINE void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec two = splat(2), half = splat(0.5);
    const Vec s1 = add(m[1], m[2]), s2 = add(m[3], m[4]);
    const Vec o1 = mul(splat(kRoot / 2), sub(m[1], m[2]));
    const Vec o2 = mul(splat(kRoot), sub(m[3], m[4]));
    y[0] = add(add(m[0], s1), s2);
    y[1] = add(o1, o2);
    y[2] = fma(half, s1, add(s2, s2));
    y[3] = fma(half, o1, fma(two, o2, m[5]));
  }
  LASEM_INLINE void output_grad(const Vec (&y)[4], Vec (&m)[6]) {
    const Vec p = splat(kRoot / 2), q = splat(kRoot), two = splat(2), half = splat(0.5);
    const Vec even1 = fma(half, y[2], y[0]), odd1 = fma(half, y[3], y[1]);
    const Vec even2 = fma(two, y[2], y[0]), odd2 = fma(two, y[3], y[1]);
    m[0] = y[0];
    m[1] = fma(p, odd1, even1);
    m[2] = fnma(p, odd1, even1);
    m[3] = fma(q, odd2, even2);
    m[4] = fnma(q, odd2, even2);
    m[5] = y[3];
  }
};

template <>
struct Winograd<2, 5> : WinogradShape<2, 5>, SixPoints {
  static constexpr double kG[6][5] = {{1, 0, 0, 0, 0},
                                      {-2.0 / 3, -kRoot / 3, -1.0 / 3, -kRoot / 6, -1.0 / 6},
                                      {-2.0 / 3, kRoot / 3, -1.0 / 3, kRoot / 6, -1.0 / 6},
                                      {1.0 / 6, kRoot / 6, 1.0 / 3, kRoot / 3, 2.0 / 3},
                                      {1.0 / 6, -kRoot / 6, 1.0 / 3, -kRoot / 3, 2.0 / 3},
                                      {0, 0, 0, 0, 1}};

  LASEM_INLINE void output(const Vec (&m)[6], Vec (&y)[2]) {
    y[0] = add(add(m[0], add(m[1], m[2])), add(m[3], m[4]));
    y[1] = fma(splat(kRoot / 2), sub(m[1], m[2]), fma(splat(kRoot), sub(m[3], m[4]), m[5]));
  }
  LASEM_INLINE void output_grad(const Vec (&y)[2], Vec (&m)[6]) {
    const Vec p = splat(kRoot / 2), q = splat(kRoot);
    m[0] = y[0];
    m[1] = fma(p, y[1], y[0]);
    m[2] = fnma(p, y[1], y[0]);
    m[3] = fma(q, y[1], y[0]);
    m[4] = fnma(q, y[1], y[0]);
    m[5] = y[1];
  }
};

}  // namespace LASEM_ISA
}  // namespace lasem_fast
