// Gradient of what is added behind a level's convolution: the pool undone, whether or not the
// convolution's own ReLU was open.

namespace lasem_fast {
namespace LASEM_ISA {

LASEM_INLINE void copy_or_add(Scalar* to, Vec v, int64_t n, bool adds) {
  store_some(to, adds ? add(load_some(to, n), v) : v, n);
}

// Writes or adds one output image's gradient to an image of the size of the convolution.
static void skip_image(const SkipShape& s, const Scalar* dy, const uint8_t* code, Scalar* to,
                       bool adds) {
  const int64_t channels = s.channels;
  for (int64_t y = 0; y < s.conv_height; ++y)
    for (int64_t x = 0; x < s.conv_width; ++x, to += channels) {
      const int64_t wy = (y + s.pool_pad) / s.pool, wx = (x + s.pool_pad) / s.pool;
      if (wy >= s.out_height || wx >= s.out_width) {
        if (!adds) memset(to, 0, sizeof(Scalar) * channels);
        continue;
      }
      const int64_t at = (wy * s.out_width + wx) * channels;
      const int won =
          static_cast<int>((y + s.pool_pad) % s.pool * s.pool + (x + s.pool_pad) % s.pool);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t n = channels - c;
        const Code passes = code_position(code_load_some(code + at + c, n));
        copy_or_add(to + c, keep(code_is(passes, won), load_some(dy + at + c, n)), n, adds);
      }
    }
}

// Images are counted over the rows of the skip, sample by sample.
static void skip_gradient(const SkipShape& s, const SkipBackward& args, int64_t begin,
                          int64_t end) {
  const int64_t in = s.out_height * s.out_width * s.channels;
  const int64_t out = s.conv_height * s.conv_width * s.channels;
  const Scalar* dy = static_cast<const Scalar*>(args.dy);
  for (int64_t image = begin; image < end; ++image) {
    const int64_t skip = image / s.samples, sample = image % s.samples;
    Scalar* to = static_cast<Scalar*>(args.dskip) + image * out;
    const int64_t* first = args.users + args.users_at[skip];
    const int64_t* last = args.users + args.users_at[skip + 1];
    if (first == last) memset(to, 0, sizeof(Scalar) * out);
    for (const int64_t* row = first; row < last; ++row) {
      const int64_t from = (*row * s.samples + sample) * in;
      skip_image(s, dy + from, args.code + from, to, row != first);
    }
  }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
