// Levels whose weights outgrow the caches while the images are few: each panel of weights is
// transformed into a task's scratch and meets all blocks there, so that what is transformed, more
// than the weights themselves, never goes through memory. V, dM and dV of all blocks do.

namespace lasem_fast {
namespace LASEM_ISA {

// Where a panel lies among those of a class; -1 where the class does without it.
LASEM_INLINE int64_t place_of(const LevelClass& of, int64_t panel) {
  for (int64_t i = 0; i < of.panel_count; ++i)
    if (of.panels[i] == panel) return i;
  return -1;
}

// Calls body(class, index) for all blocks.
template <class Body>
LASEM_INLINE void for_blocks(const LevelPlan& p, const Body& body) {
  int64_t index = 0;
  for (int64_t i = 0; i < p.class_count; ++i)
    for (int64_t n = 0; n < p.classes[i].blocks; ++n) body(p.classes[i], index++);
}

template <class F>
static void gather_inputs(const LevelPlan& p, const LevelForward& args, Scalar* scratch,
                          int64_t index) {
  memset(scratch, 0, sizeof(Scalar) * p.shape.in_channels);
  Block block;
  find_block(p, index, &block);
  block_inputs<F>(p, args, block, scratch, static_cast<Scalar*>(args.inputs) + index * p.in_size);
}

template <class F, int kPool>
static void forward_panel(const LevelPlan& p, const LevelForward& args, Scalar* scratch,
                          int64_t panel) {
  Scalar* m = scratch + p.batches * p.weight_batch;
  pack_channels<F>(p, args.weights, panel, 0, p.shape.in_channels, scratch, p.weight_batch);
  for_blocks(p, [&](const LevelClass& of, int64_t index) {
    if (place_of(of, panel) < 0) return;
    Block block;
    find_block(p, index, &block);
    block_outputs<F, kPool>(p, args, block, panel,
                            static_cast<const Scalar*>(args.inputs) + index * p.in_size, scratch,
                            m);
  });
  if (args.streams) stream_end();
}

// The backward of one block: its parts of V (later dV), dM and the bias gradients.
template <class F, int kPool>
static Backward<F, kPool> backward_of_block(const LevelPlan& p, const LevelBackward& args,
                                            Scalar* edge, int64_t index) {
  memset(edge, 0, sizeof(Scalar) * 2 * p.shape.in_channels);
  return {p,
          args,
          static_cast<Scalar*>(args.inputs) + index * p.in_size,
          static_cast<Scalar*>(args.outputs) + index * p.out_size,
          edge,
          nullptr,
          static_cast<Scalar*>(args.bias_sums) + index * p.out_stride,
          nullptr,
          {p, args, nullptr, nullptr}};
}

// Leaves of a block the units whose image takes part, by a test of its first unit.
template <class Test>
static void keep_images(const LevelPlan& p, Block* block, const Test& test) {
  const int64_t per_image = p.units_y * p.units_x;
  int64_t kept = 0;
  for (int64_t i = 0; i < block->units; i += per_image) {
    if (!test(block->unit[i])) continue;
    for (int64_t n = 0; n < per_image; ++n) block->unit[kept++] = block->unit[i + n];
  }
  block->units = kept;
  block->tiles = number_tiles(block->unit, kept);
}

template <class F, int kPool>
static void gather_both(const LevelPlan& p, const LevelBackward& args, Scalar* scratch,
                        int64_t index) {
  const Backward<F, kPool> backward = backward_of_block<F, kPool>(p, args, scratch, index);
  Block block;
  find_block(p, index, &block);
  const LevelClass& of = *block.of;
  const int64_t out = out_batch(p, of, of.out_row);
  keep_images(p, &block, [&](const Unit& first) { return backward.begin_image(first); });
  args.block_rows[index] = block.tiles;
  memset(backward.dbias, 0, sizeof(Scalar) * p.out_stride);
  // Columns of dM that no row writes are read by the products.
  if (of.has_idle_vectors) memset(backward.m, 0, sizeof(Scalar) * p.batches * out);
  backward.gather(of, block.unit, block.units, in_batch(p, of), out);
}

template <class F>
static void weight_grad_panel(const LevelPlan& p, const LevelBackward& args, Scalar* du,
                              int64_t panel) {
  for (int64_t b = 0; b < p.batches; ++b) {
    bool adds = false;
    for_blocks(p, [&](const LevelClass& of, int64_t index) {
      const int64_t place = place_of(of, panel), rows = args.block_rows[index];
      if (place < 0 || rows == 0) return;
      const Scalar* vb =
          static_cast<const Scalar*>(args.inputs) + index * p.in_size + b * in_batch(p, of);
      const Scalar* mb = static_cast<const Scalar*>(args.outputs) + index * p.out_size +
                         b * out_batch(p, of, of.out_row) + place * kPanel;
      add_panel_grad(p, of, rows, vb, mb, adds, du + b * p.weight_batch);
      adds = true;
    });
    if (!adds) memset(du + b * p.weight_batch, 0, sizeof(Scalar) * p.weight_batch);
  }
  const int64_t first = panel * 2, last = at_most(first + 2, p.out_vectors);
  PanelFilters<F> filters;
  for (int64_t c = 0, n; c < p.shape.in_channels; c += n) {
    n = at_most(filters.kChannels, p.shape.in_channels - c);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t h = 0; h < last - first; ++h) {
        Vec u[F::kPoints * F::kPoints], taps[kTaps<F>];
        for (int64_t b = 0; b < F::kPoints * F::kPoints; ++b)
          u[b] = load(du + b * p.weight_batch + (c + i) * kPanel + h * kLanes);
        filter_gradient<F>(u, taps);
        store_taps<F>(taps, filters.taps[h] + i * kTaps<F>, filters.kRow, kLanes);
      }
    for (int64_t vector = first; vector < last; ++vector) filters.store(p, args, vector, c, n);
  }
  for (int64_t vector = first; vector < last; ++vector) {
    Vec sum = zero();
    for (int64_t index = 0; index < p.blocks; ++index)
      sum = add(sum, load(static_cast<const Scalar*>(args.bias_sums) + index * p.out_stride +
                          vector * kLanes));
    store_bias_grad(p, args, vector, sum);
  }
}

// dV of one panel of depth, in the place of V, from as many panels of outputs at once as have room.
template <class F>
static void input_grad_panel(const LevelPlan& p, const LevelBackward& args, Scalar* w,
                             int64_t panel) {
  const int64_t batch_stride = p.back_panels * kPanel * kPanel + kLine;
  for (int64_t first = 0; first < p.out_panels; first += p.back_panels) {
    const int64_t last = at_most(first + p.back_panels, p.out_panels);
    const int64_t begin = first * kPanel, end = at_most(last * kPanel, p.out_vectors * kLanes);
    for (int64_t o = begin; o < end; ++o)
      pack_back_output<F>(p, filter_of(p, args.weights, o), panel, w + (o - begin) * kPanel,
                          batch_stride);
    for (int64_t b = 0; b < p.batches; ++b)
      for_blocks(p, [&](const LevelClass& of, int64_t index) {
        Scalar* vb = static_cast<Scalar*>(args.inputs) + index * p.in_size + b * in_batch(p, of);
        const Scalar* mb = static_cast<const Scalar*>(args.outputs) + index * p.out_size +
                           b * out_batch(p, of, of.out_row);
        for_runs(p, of, first, last, [&](int64_t at, int64_t from, int64_t depth) {
          add_run_product(p, of, args.block_rows[index], depth, mb, at,
                          w + b * batch_stride + (from - begin) * kPanel, vb + panel * kPanel);
        });
      });
  }
}

template <class F, int kPool>
static void add_input_grads(const LevelPlan& p, const LevelBackward& args, Scalar* scratch,
                            int64_t index) {
  const Backward<F, kPool> backward = backward_of_block<F, kPool>(p, args, scratch, index);
  Block block;
  find_block(p, index, &block);
  keep_images(p, &block, [&](const Unit& first) { return backward.takes_part(first); });
  backward.add_input_grads(block.unit, block.units, in_batch(p, *block.of));
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
