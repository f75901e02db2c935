// Branches, barriers, shuffles and the products of tensor cores.
#pragma once
#include "arithmetic.h"
#include "memory.h"

namespace ptx {
inline void branch(Warp& w, const Instruction& i, uint32_t) {
  w.flow = BRANCH;
  w.to = i.at[0];
}
inline void leave(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    if (!w.lanes[l].copies.empty()) fail("%s with copies that were never waited for", i.name);
  });
  if (!w.products.empty()) fail("%s with products that were never waited for", i.name);
  w.flow = EXIT;
}
inline void barrier(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  if (i.count != 1 || w.lane(i.at[0])[0] != 0) fail("%s of some threads", i.name);
  w.flow = BARRIER;
}
inline void warp_barrier(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  if (uint32_t(w.lane(i.at[0])[0]) != w.live) fail("%s of some lanes", i.name);
  ++w.epoch;
}
// Any lane, but always the same one.
inline void elect(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  if (mask != ALL || uint32_t(w.lane(i.at[2])[0]) != ALL) fail("%s of some lanes", i.name);
  for (uint32_t l = 0; l < LANES; ++l) {
    w.lane(i.at[0])[l] = w.machine->elected;
    w.lane(i.at[1])[l] = l == w.machine->elected;
  }
}
// Which lane a lane reads, and from where on that is itself: with all lanes in one segment.
template <class F>
void shuffle(Warp& w, const Instruction& i, uint32_t mask, F source) {
  whole(w, mask, i);
  if (i.count != 5 || uint32_t(w.lane(i.at[4])[0]) != ALL) fail("%s of some lanes", i.name);
  uint64_t values[LANES];
  memcpy(values, w.lane(i.at[1]), sizeof values);
  each(mask, [&](int l) {
    const int clamp = int(w.lane(i.at[3])[l]), from = source(l, int(w.lane(i.at[2])[l]));
    if (clamp != 31) fail("%s of segments", i.name);
    w.lane(i.at[0])[l] = uint32_t(values[from & 31]);
  });
}
inline void shuffle_xor(Warp& w, const Instruction& i, uint32_t mask) {
  shuffle(w, i, mask, [](int lane, int bits) { return lane ^ bits; });
}
inline void shuffle_from(Warp& w, const Instruction& i, uint32_t mask) {
  shuffle(w, i, mask, [](int, int lane) { return lane; });
}
template <class T, bool LARGEST>
void extreme_of_lanes(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  if (uint32_t(w.lane(i.at[2])[0]) != ALL) fail("%s of some lanes", i.name);
  T best = get<T>(w.lane(i.at[1])[0]);
  for (int l = 1; l < LANES; ++l) {
    const T value = get<T>(w.lane(i.at[1])[l]);
    if (LARGEST ? value > best : value < best) best = value;
  }
  each(mask, [&](int l) { w.lane(i.at[0])[l] = put(best); });
}
inline void proxy_fence(Warp& w, const Instruction&, uint32_t) { w.machine->shared->fence(w); }
inline void nothing(Warp&, const Instruction&, uint32_t) {}

enum Operand { BF16, F16, TF32 };
template <Operand TYPE>
constexpr int DEPTH = TYPE == TF32 ? 8 : 16;
template <Operand TYPE>
inline float decoded(uint64_t bits, int part) {
  if constexpr (TYPE == TF32) return get<float>(bits & 0xffffe000u);  // the rest is not read
  const uint16_t half = uint16_t(bits >> 16 * part);
  return TYPE == BF16 ? from_bfloat(half) : from_half(half);
}
// A fragment's 16 rows of a, K deep: register r of a lane has row lane / 4 + 8 * (r % 2).
template <Operand TYPE>
inline void rows_of(Warp& w, const int* at, float (*a)[DEPTH<TYPE>]) {
  constexpr int K = DEPTH<TYPE>, EACH = TYPE == TF32 ? 1 : 2;
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < LANES; ++l)
      for (int e = 0; e < EACH; ++e)
        a[l / 4 + 8 * (r % 2)][l % 4 * EACH + e + K / 2 * (r / 2)] =
            decoded<TYPE>(w.lane(at[r])[l], e);
}
// One element: products are exact in double, their sum is rounded once to float.
template <int K>
inline float summed(float c, const float* a, const float* b) {
  double sum = c;
  for (int k = 0; k < K; ++k) sum += double(a[k]) * double(b[k]);
  return float(sum);
}
template <Operand TYPE>
void product(Warp& w, const Instruction& i, uint32_t mask) {
  constexpr int K = DEPTH<TYPE>, EACH = TYPE == TF32 ? 1 : 2;
  whole(w, mask, i);
  if (mask != ALL || i.count != 14) fail("%s of some lanes", i.name);
  float a[16][K], b[8][K], d[4][LANES];
  rows_of<TYPE>(w, i.at + 4, a);
  for (int r = 0; r < 2; ++r)
    for (int l = 0; l < LANES; ++l)
      for (int e = 0; e < EACH; ++e)
        b[l / 4][l % 4 * EACH + e + K / 2 * r] = decoded<TYPE>(w.lane(i.at[8 + r])[l], e);
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < LANES; ++l)
      d[r][l] = summed<K>(get<float>(w.lane(i.at[10 + r])[l]), a[l / 4 + 8 * (r / 2)],
                          b[l % 4 * 2 + r % 2]);
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < LANES; ++l) w.lane(i.at[r])[l] = put(d[r][l]);
}

inline void add_warp(Table& t) {
  t["bra"] = branch;
  t["ret"] = leave;
  t["bar.sync"] = barrier;
  t["bar.warp.sync"] = warp_barrier;
  t["elect.sync"] = elect;
  t["shfl.sync.bfly.b32"] = shuffle_xor;
  t["shfl.sync.idx.b32"] = shuffle_from;
  t["redux.sync.max.s32"] = extreme_of_lanes<int32_t, true>;
  t["redux.sync.min.s32"] = extreme_of_lanes<int32_t, false>;
  t["fence.proxy.async.shared::cta"] = proxy_fence;
  t["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = product<BF16>;
  t["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = product<F16>;
  t["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = product<TF32>;
}
}  // namespace ptx
