// The contract between the batch-norm operator (plain C++) and its kernels per instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lasem_fast {

// y [rows, samples, height, width, channels], each row normalised by itself, then ReLU (relu), a sum
// with a row of a skip, ReLU (relu_after) and max-pool; an output [.., out_height, out_width, ..].
// Without a skip the two ReLUs are one, which relu_after stands for.
struct NormShape {
  int64_t rows, samples, height, width, channels, out_height, out_width, pool, pool_pad;
  int64_t parts;  // of a row's samples, which are summed by themselves
  bool relu, relu_after;

  int64_t image() const { return height * width * channels; }
  int64_t out_image() const { return out_height * out_width * channels; }
  int64_t first_sample(int64_t part) const { return samples * part / parts; }
};

// A part's sums over samples and pixels, [2][channels]: mean and squares of what differs from it in
// the forward, gradients and gradients times what differs from the row's mean in the backward.
inline int64_t part_size(const NormShape& s) { return 2 * s.channels; }

// Of every row [rows][channels]: output = (y - mean) * scale + shift.
struct NormForward {
  const void *y, *mean, *scale, *shift;
  const void* skip;          // [S, samples, height, width, channels], or null
  const int64_t* skip_rows;  // of every row; null: its own number
  void* out;
  uint8_t* code;  // see simd.h
};

// Of every row [rows][channels]: dy = scale * gradient + slope * (y - mean) + shift.
struct NormBackward {
  const void *dout, *y, *mean, *scale, *slope, *shift;
  const uint8_t* code;
  void* dy;
};

// Every range is split by the caller; none of these functions starts a thread or allocates. Parts
// and images are counted over the rows. `scratch` holds part_size scalars.
struct NormKernels {
  void (*moments)(const NormShape& shape, const void* y, double* sums, int64_t part);
  void (*forward)(const NormShape& shape, const NormForward& args, int64_t image);
  void (*gradient_sums)(const NormShape& shape, const NormBackward& args, double* sums,
                        void* scratch, int64_t part);
  void (*backward)(const NormShape& shape, const NormBackward& args, int64_t image);
};

extern const NormKernels kNormAvx512;
extern const NormKernels kNormAvx2;
extern const NormKernels kNormDouble;

}  // namespace lasem_fast
