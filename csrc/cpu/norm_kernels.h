// Batch norm of every row by itself, and what follows it up to the pool.

namespace lasem_fast {
namespace LASEM_ISA {

constexpr int64_t kChunk = 4096;   // scalars that stay in the L1 for a second look
constexpr int64_t kWindows = 64;   // whose gradients are summed in the precision of the scalars

// Sum of f(i) over i < n, in four chains.
template <class F>
LASEM_INLINE Vec sum_of(int64_t n, const F& f) {
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], f(i + j));
  for (; i < n; ++i) sum[0] = add(sum[0], f(i));
  return add(add(sum[0], sum[1]), add(sum[2], sum[3]));
}

// Means and squares of chunks, put together as Chan, Golub and LeVeque do (1979).
static void moments(const NormShape& s, const void* all, double* sums, int64_t part) {
  const int64_t row = part / s.parts, first = s.first_sample(part % s.parts);
  const int64_t pixels = (s.first_sample(part % s.parts + 1) - first) * s.height * s.width;
  const Scalar* y = static_cast<const Scalar*>(all) + (row * s.samples + first) * s.image();
  double* mean = sums + part * part_size(s);
  double* square = mean + s.channels;
  memset(mean, 0, sizeof(double) * part_size(s));
  const int64_t chunk = at_least(kChunk / s.channels, 8), stride = s.channels;
  for (int64_t before = 0; before < pixels; before += chunk, y += chunk * stride) {
    const int64_t n = at_most(chunk, pixels - before);
    const double share = static_cast<double>(n) / (before + n), weight = share * before;
    for (int64_t c = 0; c < stride; c += kLanes) {
      const int64_t lanes = stride - c;
      const Scalar* from = y + c;
      const Vec sum = sum_of(n, [&](int64_t i) { return load_some(from + i * stride, lanes); });
      const Vec middle = mul(sum, splat(1.0 / n));
      // a sum of large values is off by more than the squares may be: the differences say by how much
      Vec left = zero();
      const Vec squares = sum_of(n, [&](int64_t i) {
        const Vec d = sub(load_some(from + i * stride, lanes), middle);
        left = add(left, d);
        return mul(d, d);
      });
      Scalar of_middle[kLanes], of_left[kLanes], of_squares[kLanes];
      store(of_middle, middle);
      store(of_left, left);
      store(of_squares, squares);
      for (int64_t i = 0; i < at_most(lanes, kLanes); ++i) {
        const double off = of_left[i] / static_cast<double>(n);
        const double delta = of_middle[i] + off - mean[c + i];
        mean[c + i] += delta * share;
        square[c + i] += of_squares[i] - off * of_left[i] + delta * delta * weight;
      }
    }
  }
}

// Calls f(position, pixel) for each pixel of a window that lies inside the image.
template <class F>
LASEM_INLINE void for_window(const NormShape& s, int64_t wy, int64_t wx, const F& f) {
  const int64_t top = wy * s.pool - s.pool_pad, left = wx * s.pool - s.pool_pad;
  for (int64_t i = 0; i < s.pool; ++i)
    for (int64_t j = 0; j < s.pool; ++j) {
      const int64_t y = top + i, x = left + j;
      if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
      f(static_cast<int>(i * s.pool + j), y * s.width + x);
    }
}

static void norm_forward(const NormShape& s, const NormForward& args, int64_t image) {
  const int64_t row = image / s.samples, sample = image % s.samples, channels = s.channels;
  const Scalar* y = static_cast<const Scalar*>(args.y) + image * s.image();
  const Scalar* mean = static_cast<const Scalar*>(args.mean) + row * channels;
  const Scalar* scale = static_cast<const Scalar*>(args.scale) + row * channels;
  const Scalar* shift = static_cast<const Scalar*>(args.shift) + row * channels;
  const Scalar* skip = static_cast<const Scalar*>(args.skip);
  if (skip) skip += ((args.skip_rows ? args.skip_rows[row] : row) * s.samples + sample) * s.image();
  Scalar* out = static_cast<Scalar*>(args.out) + image * s.out_image();
  uint8_t* codes = args.code + image * s.out_image();
  for (int64_t wy = 0; wy < s.out_height; ++wy)
    for (int64_t wx = 0; wx < s.out_width; ++wx, out += channels, codes += channels)
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t lanes = channels - c;
        const Vec middle = load_some(mean + c, lanes), slope = load_some(scale + c, lanes),
                  start = load_some(shift + c, lanes);
        Vec best = zero();
        Code code = code_splat(kNothing);
        bool starts = !s.relu_after;
        for_window(s, wy, wx, [&](int t, int64_t pixel) {
          const int64_t at = pixel * channels + c;
          const Vec v = fma(sub(load_some(y + at, lanes), middle), slope, start);
          take(best, code, starts, t, v, s.relu, skip ? skip + at : nullptr, lanes);
        });
        store_some(out + c, best, lanes);
        code_store_some(codes + c, code, lanes);
      }
}

LASEM_INLINE void flush(Scalar* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  memset(from, 0, sizeof(Scalar) * n);
}

static void gradient_sums(const NormShape& s, const NormBackward& args, double* all, void* scratch,
                          int64_t part) {
  const int64_t row = part / s.parts, channels = s.channels, size = part_size(s);
  const Scalar* mean = static_cast<const Scalar*>(args.mean) + row * channels;
  double* sums = all + part * size;
  Scalar* near = static_cast<Scalar*>(scratch);
  memset(sums, 0, sizeof(double) * size);
  memset(near, 0, sizeof(Scalar) * size);
  int64_t windows = 0;
  const int64_t last = row * s.samples + s.first_sample(part % s.parts + 1);
  for (int64_t image = row * s.samples + s.first_sample(part % s.parts); image < last; ++image) {
    const Scalar* y = static_cast<const Scalar*>(args.y) + image * s.image();
    const Scalar* dout = static_cast<const Scalar*>(args.dout) + image * s.out_image();
    const uint8_t* codes = args.code + image * s.out_image();
    for (int64_t wy = 0; wy < s.out_height; ++wy)
      for (int64_t wx = 0; wx < s.out_width; ++wx, dout += channels, codes += channels) {
        for (int64_t c = 0; c < channels; c += kLanes) {
          const int64_t lanes = channels - c;
          const Code code = code_load_some(codes + c, lanes);
          const Vec g = keep(code_open(code), load_some(dout + c, lanes));
          const Vec middle = load_some(mean + c, lanes);
          Vec product = zero();
          for_window(s, wy, wx, [&](int t, int64_t pixel) {
            const Vec d = sub(load_some(y + pixel * channels + c, lanes), middle);
            product = add(product, keep(code_is(code, t), mul(g, d)));
          });
          Scalar *to = near + c, *next = near + channels + c;
          store_some(to, add(load_some(to, lanes), g), lanes);
          store_some(next, add(load_some(next, lanes), product), lanes);
        }
        if (++windows % kWindows == 0) flush(near, sums, size);
      }
  }
  flush(near, sums, size);
}

static void norm_backward(const NormShape& s, const NormBackward& args, int64_t image) {
  const int64_t row = image / s.samples, channels = s.channels;
  const Scalar* y = static_cast<const Scalar*>(args.y) + image * s.image();
  const Scalar* mean = static_cast<const Scalar*>(args.mean) + row * channels;
  const Scalar* scale = static_cast<const Scalar*>(args.scale) + row * channels;
  const Scalar* slope = static_cast<const Scalar*>(args.slope) + row * channels;
  const Scalar* shift = static_cast<const Scalar*>(args.shift) + row * channels;
  const Scalar* dout = static_cast<const Scalar*>(args.dout) + image * s.out_image();
  const uint8_t* codes = args.code + image * s.out_image();
  Scalar* dy = static_cast<Scalar*>(args.dy) + image * s.image();
  for (int64_t py = 0; py < s.height; ++py)
    for (int64_t px = 0; px < s.width; ++px, y += channels, dy += channels) {
      const int64_t wy = (py + s.pool_pad) / s.pool, wx = (px + s.pool_pad) / s.pool;
      const bool read = wy < s.out_height && wx < s.out_width;
      const int64_t at = (wy * s.out_width + wx) * channels;
      const int won =
          static_cast<int>((py + s.pool_pad) % s.pool * s.pool + (px + s.pool_pad) % s.pool);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t lanes = channels - c;
        Vec d = fma(sub(load_some(y + c, lanes), load_some(mean + c, lanes)),
                    load_some(slope + c, lanes), load_some(shift + c, lanes));
        if (read) {
          const Mask mine = code_is(code_load_some(codes + at + c, lanes), won);
          const Vec g = keep(mine, load_some(dout + at + c, lanes));
          d = fma(load_some(scale + c, lanes), g, d);
        }
        store_some(dy + c, d, lanes);
      }
    }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
