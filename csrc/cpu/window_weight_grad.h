// Weight gradient of a level with a pool, without transforms. A window passes its gradient on to
// one output at most, so that behind a 3 x 3 pool 9 C products are left for a window and an output
// channel, where F(4x4, 3x3) takes 20 C. What is left is exact: no transform rounds it.

namespace lasem_fast {
namespace LASEM_ISA {

template <class F, int kPool>
struct WindowWeightGrad {
  static constexpr int side = unit_side(F::kTile, kPool), R = side * F::kTile, r = F::kFilter;
  static constexpr int kWindows = R / kPool, kPatch = window_patch(R, r);
  static constexpr int kUnits = window_units(kPatch), kList = kUnits * kWindows * kWindows;

  const LevelPlan& p;
  const LevelBackward& args;
  Scalar* patches;   // [kUnits][kPatch][kPatch][kLanes]: one vector of channels of the inputs
  Scalar* gradient;  // [lists][kList], what passes a window
  int32_t* corner;   // [lists][kList], the first of the inputs that it meets, in patches
  int32_t* length;   // [lists]; a list is for one output channel and kUnits units
  Scalar* dweight;   // [vectors of channels][outputs][r * r][kLanes]

  WindowWeightGrad(const LevelPlan& plan, const LevelBackward& level, Scalar* scratch,
                   Scalar* partial)
      : p(plan), args(level), patches(scratch), dweight(partial) {
    gradient = patches + p.window_patches;
    corner = reinterpret_cast<int32_t*>(gradient + p.window_lists * kList);
    length = corner + p.window_lists * kList;
  }

  int64_t outputs() const { return p.out_vectors * kLanes; }

  // Sorts the windows of some units in one slot by output channel, without those that pass nothing
  // on.
  void list_windows(const Unit* units, int64_t count, int64_t slot, int64_t first_list) const {
    const LevelShape& s = p.shape;
    int64_t window[kList];
    int32_t place[kList];
    int64_t windows = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t wy = 0; wy < at_most(kWindows, s.out_height - units[i].wy); ++wy)
        for (int64_t wx = 0; wx < at_most(kWindows, s.out_width - units[i].wx); ++wx) {
          const Unit& u = units[i];
          const int64_t row = u.out_image(slot, s.samples) * s.out_height + u.wy + wy;
          window[windows] = (row * s.out_width + u.wx + wx) * s.out_channels;
          place[windows++] =
              static_cast<int32_t>(((i * kPatch + wy * kPool) * kPatch + wx * kPool) * kLanes);
        }
    int32_t shift[16] = {};
    for (int t = 0; t < kPool * kPool; ++t) shift[t] = (t / kPool * kPatch + t % kPool) * kLanes;
    const int64_t per_slot = p.branch_vectors * kLanes;
    for (int64_t co = 0; co < per_slot; ++co) {
      const int64_t list = first_list + slot * per_slot + co;
      const Scalar* dy = static_cast<const Scalar*>(args.dy) + co;
      const uint8_t* code = args.code + co;
      Scalar* g = gradient + list * kList;
      int32_t* c = corner + list * kList;
      int32_t n = 0;
      if (co < s.out_channels)
        for (int64_t w = 0; w < windows; ++w) {
          const Scalar value = dy[window[w]];
          const uint8_t open = code[window[w]];
          g[n] = value;
          c[n] = place[w] + shift[open & 15];
          n += (value != 0) & (open < kClosed);
        }
      length[list] = n;
    }
  }

  // One vector of channels of the inputs that the outputs of some units see, zero beyond the
  // border.
  void gather_patches(const Unit* units, int64_t count, int64_t channel) const {
    const LevelShape& s = p.shape;
    const int64_t left = s.in_channels - channel;
    Scalar* to = patches;
    for (int64_t i = 0; i < count; ++i) {
      const Unit& u = units[i];
      const Scalar* image = static_cast<const Scalar*>(args.x) +
                            u.image * s.height * s.width * s.in_channels + channel;
      for (int64_t y = u.y - s.padding; y < u.y - s.padding + kPatch; ++y) {
        const int64_t from = u.x - s.padding;
        if (y < 0 || y >= s.height) {
          for (int64_t x = 0; x < kPatch; ++x, to += kLanes) store(to, zero());
          continue;
        }
        const Scalar* row = image + y * s.width * s.in_channels;
        for (int64_t x = from; x < from + kPatch; ++x, to += kLanes)
          store(to, x < 0 || x >= s.width ? zero() : load_some(row + x * s.in_channels, left));
      }
    }
  }

  // dweight += gradient * inputs over the windows of one list, for kCount rows of the filter.
  template <int kFirst, int kCount>
  __attribute__((always_inline)) void add_rows(int64_t list, Scalar* to) const {
    constexpr int taps = kCount * r;
    const int64_t n = length[list];
    const Scalar* g = gradient + list * kList;
    const int32_t* at = corner + list * kList;
    Vec sum[taps];
#pragma GCC unroll 32
    for (int t = 0; t < taps; ++t) sum[t] = zero();
    for (int64_t k = 0; k < n; ++k) {
      const Vec scale = broadcast(g + k);
      const Scalar* from = patches + at[k] + kFirst * kPatch * kLanes;
#pragma GCC unroll 32
      for (int t = 0; t < taps; ++t)
        sum[t] = fma(scale, load(from + (t / r * kPatch + t % r) * kLanes), sum[t]);
    }
    to += kFirst * r * kLanes;
#pragma GCC unroll 32
    for (int t = 0; t < taps; ++t) store(to + t * kLanes, add(load(to + t * kLanes), sum[t]));
  }

  // As many rows at once as there are registers for.
  template <int kFirst = 0>
  void add_products(int64_t list, Scalar* to) const {
    constexpr int at_once = kSums / r < r - kFirst ? kSums / r : r - kFirst;
    if (length[list] == 0) return;
    add_rows<kFirst, at_once>(list, to);
    if constexpr (kFirst + at_once < r) add_products<kFirst + at_once>(list, to);
  }

  void add_block(const Unit* block, int64_t units) const {
    const int64_t slots = p.shape.slots, per_slot = p.branch_vectors * kLanes;
    for (int64_t i = 0, list = 0; i < units; i += kUnits, list += outputs())
      for (int64_t slot = 0; slot < slots; ++slot)
        if (block->takes(slot)) list_windows(block + i, at_most(kUnits, units - i), slot, list);
    Scalar* to = dweight;
    for (int64_t channel = 0; channel < p.shape.in_channels; channel += kLanes) {
      for (int64_t i = 0, list = 0; i < units; i += kUnits, list += outputs()) {
        gather_patches(block + i, at_most(kUnits, units - i), channel);
        for (int64_t slot = 0; slot < slots; ++slot) {
          if (!block->takes(slot)) continue;
          for (int64_t o = slot * per_slot; o < (slot + 1) * per_slot; ++o)
            add_products(list + o, to + o * r * r * kLanes);
        }
      }
      to += outputs() * r * r * kLanes;
    }
  }
};

// Sums the tasks' partial gradients in task order; one item is one output.
static void finish_windows(const LevelPlan& p, const LevelBackward& args, int64_t begin,
                           int64_t end) {
  const LevelShape& s = p.shape;
  const Scalar* partial = static_cast<const Scalar*>(args.partial);
  const int64_t taps = s.filter * s.filter, outputs = p.out_vectors * kLanes;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t slot = o / (p.branch_vectors * kLanes), co = o % (p.branch_vectors * kLanes);
    if (co >= s.out_channels) continue;
    const int64_t branch = p.rows.branch_of[slot];
    Scalar* dweight = static_cast<Scalar*>(args.dweights[branch]) + co * s.in_channels * taps;
    for (int64_t channel = 0; channel < s.in_channels; ++channel)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t vector = channel / kLanes * outputs + o;
        const Scalar* from = partial + (vector * taps + t) * kLanes + channel % kLanes;
        Scalar sum = from[0];
        for (int64_t task = 1; task < args.tasks; ++task) sum += from[task * p.partial_size];
        dweight[channel * taps + t] = sum;
      }
    if (!args.dbiases) continue;
    const Scalar* from = partial + p.bias_at + o;
    Scalar sum = from[0];
    for (int64_t task = 1; task < args.tasks; ++task) sum += from[task * p.partial_size];
    static_cast<Scalar*>(args.dbiases[branch])[co] = sum;
  }
}

}  // namespace LASEM_ISA
}  // namespace lasem_fast
