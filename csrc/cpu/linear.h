// The contract between the linear operator (plain C++) and its kernels per instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lasem_fast {

// y [rows, outputs] = x [rows, pixels, channels] times weight [outputs, channels, pixels], all
// contiguous.
struct LinearShape {
  int64_t rows, pixels, channels, outputs;
};

// How it is cut for one instruction set; sizes are in elements of the scalar type.
struct LinearPlan {
  LinearShape shape;
  int64_t features;               // pixels * channels
  int64_t row_blocks;             // of the forward product
  int64_t pack_size, pack_items;  // weights for the forward product
  int64_t forward_scratch;        // per task
  int64_t feature_stride;         // an odd number of panels, so that no two rows share a set
  int64_t feature_panels;         // of the backward products
  int64_t columns_size;           // weights, then their gradient, in the order of x
  int64_t backward_scratch;       // per task
};

// Consecutive rows whose gradient is not exactly zero.
struct RowRun {
  int64_t begin, rows;
};

struct LinearForward {
  const void *x, *packed, *bias;
  void* y;
};

struct LinearBackward {
  const void *dy, *x;
  const RowRun* runs;
  int64_t run_count;
  void* dx;       // null when not wanted
  void* columns;  // [outputs][feature_stride]
};

// Every range is split by the caller; none of these functions starts a thread or allocates.
struct LinearKernels {
  void (*plan)(const LinearShape& shape, LinearPlan* plan);
  void (*pack)(const LinearPlan& plan, const void* weight, void* packed, int64_t begin,
               int64_t end);
  void (*forward)(const LinearPlan& plan, const LinearForward& args, void* scratch, int64_t begin,
                  int64_t end);
  // Writes the runs (at most one per row) and dbias; returns the number of runs.
  int64_t (*runs)(const LinearPlan& plan, const void* dy, RowRun* runs, void* dbias);
  void (*pack_back)(const LinearPlan& plan, const void* weight, void* columns, int64_t begin,
                    int64_t end);
  void (*backward)(const LinearPlan& plan, const LinearBackward& args, void* scratch, int64_t begin,
                   int64_t end);
  void (*finish)(const LinearPlan& plan, const void* columns, void* dweight, int64_t begin,
                 int64_t end);
};

extern const LinearKernels kLinearAvx512;
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearDouble;

}  // namespace lasem_fast
