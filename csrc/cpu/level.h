// The contract between the operators (plain C++) and the kernels compiled per instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lasem_fast {

// One tree level: x [P, N, H, W, C] -> y, code [R, N, out_h, out_w, Co], all contiguous; an output
// row is a parent through a branch. A slot is a branch that some row takes, in ascending order.
struct LevelShape {
  int64_t parents, samples, height, width, in_channels;
  int64_t slots, out_channels, filter;  // filter: r of r x r
  int64_t padding, pool, pool_pad, out_height, out_width;
  int64_t conv_height, conv_width;  // of the convolution, before the pool
  int64_t tile;                     // m of F(m x m, r x r); 1 = direct
  bool toeplitz;                    // instead of F(2 x 2, 3 x 3): see toeplitz_transforms.h
};

// Which row a parent gives in a slot, and the slots' branches.
struct LevelRows {
  const int64_t* row_of;     // [parents][slots], -1 where there is none
  const int64_t* branch_of;  // [slots]
};

// The parents that go through one and the same set of slots. A block never spans two classes, and
// multiplies only the panels of columns that hold outputs of these slots.
struct LevelClass {
  const int64_t* parents;  // ascending
  int64_t count;
  int64_t slots;          // of its rows: what one of its images costs
  int64_t* panels;        // ascending; room for those of all slots
  int64_t panel_count;    // set by the plan, as all below
  int64_t columns;        // panel_count * kPanel
  int64_t out_row;        // elements from row to row of dM
  bool has_idle_vectors;  // whether its panels hold more than outputs of its slots
  int64_t block_units;    // units per block
  int64_t blocks;
};

// How a level is cut for one instruction set; sizes are in elements of the scalar type.
struct LevelPlan {
  LevelShape shape;
  LevelRows rows;
  const LevelClass* classes;
  int64_t class_count;
  int64_t tile;  // conv outputs per tile side
  int64_t unit;  // tiles per unit side: a unit is the least square that pool windows fill
  int64_t units_y, units_x;
  int64_t batches;         // matrix products per block: (m+r-1)^2, or 1 when direct
  int64_t rows_per_tile;   // rows each tile adds to a product: 1, or m^2 when direct
  int64_t depth;           // inner dimension of the forward product: C, or r^2 C when direct
  int64_t depth_stride;    // depth rounded up to whole panels
  int64_t in_row;          // elements from row to row of V
  int64_t weight_batch;    // elements from batch to batch of a panel of weights
  int64_t branch_vectors;  // vectors per slot
  int64_t out_vectors;     // vectors over all slots
  int64_t out_stride;      // outputs over all slots, rounded up to whole panels
  int64_t batch_pad;       // keeps the batches of a block out of one another's cache sets
  int64_t blocks;
  int64_t pack_size, pack_items;              // weights for the forward product
  int64_t pack_back_size, pack_back_items;    // weights for the input gradient
  int64_t in_size, panel_size, out_size;      // V, M and dM of a block, of the largest class
  int64_t forward_scratch, backward_scratch;  // per task
  int64_t partial_size, bias_at;              // weight and bias gradient of one task
  int64_t finish_items;
  int64_t out_panels, depth_panels;
  bool by_panel;        // panels of weights outside, blocks inside: see weight_stationary.h
  int64_t back_panels;  // by_panel: panels of outputs whose weights a task holds at once
  bool by_window;       // the weight gradient goes through the windows of the pool, not transforms
  int64_t window_patches, window_lists, window_scratch;
};

// What stands behind the convolution, before the pool: ReLU (relu), a sum with a row of `skip`,
// ReLU (relu_after). Without a skip the two ReLUs are one, which `relu` stands for.
struct LevelForward {
  const void *x, *skip;        // skip [S, N, conv_h, conv_w, Co], or null
  const void* const* weights;  // of every branch, [Co, C, r, r]
  const void* const* biases;   // of every branch, [Co]; null: there are none
  const int64_t* skip_rows;    // of every row; null: its own number
  bool relu, relu_after;
  void *y, *packed;
  void* inputs;   // by_panel: V of all blocks
  uint8_t* code;  // see simd.h
  bool streams;   // y goes past the caches; its vectors are aligned

  bool is_plain() const { return relu && !skip; }
};

// dskip [S, N, conv_h, conv_w, Co] from dy, code [R, N, out_h, out_w, Co].
struct SkipShape {
  int64_t rows, samples, channels, conv_height, conv_width, out_height, out_width, pool, pool_pad;
};

struct SkipBackward {
  const void* dy;
  const uint8_t* code;
  void* dskip;
  const int64_t *users, *users_at;  // row i of the skip was added to rows users[users_at[i]], ..
};

struct LevelBackward {
  const void *dy, *x;
  const void* const* weights;  // of every branch
  const uint8_t* code;
  void* dx;        // null when not wanted
  void* packed;    // transposed weights
  void* partial;   // [tasks][partial_size]
  uint8_t* wrote;  // [tasks][panels]: whether a task's partial holds anything for a panel
  void *const *dweights, *const *dbiases;  // of every branch; dbiases null when not wanted
  int64_t tasks;
  // by_panel: of all blocks, V (later dV), dM, bias gradients [out_stride] and rows that take part
  void *inputs, *outputs, *bias_sums;
  int64_t* block_rows;
};

// Which way a level goes; anything but the rule of its shape is for tests.
enum class Schedule { kByShape, kByBlock, kByPanel };

// Every range is split by the caller; none of these functions starts a thread or allocates.
// Images are counted over the parents of all classes, class after class.
struct LevelKernels {
  void (*plan)(const LevelShape& shape, const LevelRows& rows, LevelClass* classes,
               int64_t class_count, int64_t threads, bool backward, Schedule schedule,
               LevelPlan* plan);
  void (*pack)(const LevelPlan& plan, const void* const* weights, void* packed, int64_t begin,
               int64_t end);
  void (*forward)(const LevelPlan& plan, const LevelForward& args, void* scratch, int64_t begin,
                  int64_t end);
  void (*pack_back)(const LevelPlan& plan, const void* const* weights, void* packed, int64_t begin,
                    int64_t end);
  void (*backward)(const LevelPlan& plan, const LevelBackward& args, void* scratch, int64_t task,
                   int64_t begin, int64_t end);
  void (*finish)(const LevelPlan& plan, const LevelBackward& args, int64_t begin, int64_t end);
  // By panel, in this order: over blocks, panels; over blocks, panels, panels of depth, blocks.
  void (*gather_inputs)(const LevelPlan& plan, const LevelForward& args, void* scratch,
                        int64_t block);
  void (*forward_panel)(const LevelPlan& plan, const LevelForward& args, void* scratch,
                        int64_t panel);
  void (*gather_both)(const LevelPlan& plan, const LevelBackward& args, void* scratch,
                      int64_t block);
  void (*weight_grad_panel)(const LevelPlan& plan, const LevelBackward& args, void* scratch,
                            int64_t panel);
  void (*input_grad_panel)(const LevelPlan& plan, const LevelBackward& args, void* scratch,
                           int64_t panel);
  void (*add_input_grads)(const LevelPlan& plan, const LevelBackward& args, void* scratch,
                          int64_t block);
  void (*skip_gradient)(const SkipShape& shape, const SkipBackward& args, int64_t begin,
                        int64_t end);
};

extern const LevelKernels kLevelAvx512;
extern const LevelKernels kLevelAvx2;
extern const LevelKernels kLevelDouble;

}  // namespace lasem_fast
