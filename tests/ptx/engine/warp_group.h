// Products of warp groups (wgmma): every warp computes its own 16 of 64 rows, at the issue. Shared
// memory belongs to a product until the wait for it: it is read again then, and must be the same.
// Registers do not, because the assembler itself waits where they are used before.
#pragma once
#include <utility>

#include "warp_instructions.h"

namespace ptx {
// Reads an operand: into `to` and the record of it at the issue, against the record at the wait.
template <Operand TYPE>
void read_again(Warp& w, InShared& o, float* to) {
  constexpr uint32_t SIZE = TYPE == TF32 ? 4 : 2, K = DEPTH<TYPE>;
  const bool first = o.bits.empty();
  for (uint32_t n = 0; n < o.count * K; ++n) {
    uint32_t bits = 0;
    const uint32_t at = o.from.address(o.row + n / K, n % K, SIZE);
    w.machine->shared->read(w, int(n / K % LANES), &bits, at, SIZE, o.name);
    w.machine->shared->check_fence(w, at, SIZE, o.name);
    if (first) {
      o.bits.push_back(bits);
      o.begin = std::min(o.begin, at);
      o.end = std::max(o.end, at + SIZE);
    }
    if (o.bits[n] != bits) fail("%s: shared memory changed before the wait", o.name);
    if (to) to[n] = decoded<TYPE>(bits, 0);
  }
}

// Operands: d, a (4 registers or a descriptor), b, whether d is added to, 1, 1, and which of a and
// b in shared memory are columns (16-bit types only).
template <Operand TYPE, int N>
struct GroupProduct {
  static constexpr int K = DEPTH<TYPE>, REGISTERS = N / 2;
  static bool from_registers(const Instruction& i) {
    const int plain = REGISTERS + 5 + (TYPE == TF32 ? 0 : 2);
    if (i.count == plain) return false;
    // with a in registers there is no choice of columns for it
    if (i.count == plain + 3 - (TYPE == TF32 ? 0 : 1)) return true;
    fail("%s: %d operands", i.name, i.count);
  }
  static void issue(Warp& w, const Instruction& i, uint32_t mask) {
    whole(w, mask, i);
    if (mask != ALL) fail("%s of some lanes", i.name);
    const bool registers = from_registers(i);
    const int* rest = i.at + REGISTERS + (registers ? 4 : 1);
    for (int s = 2; s < 4; ++s)
      if (w.lane(rest[s])[0] != 1) fail("%s with a negated operand", i.name);
    Product p{w.committed, {}};
    for (int l = 1; l < LANES; ++l)
      if (w.lane(rest[0])[l] != w.lane(rest[0])[0]) fail("%s: several descriptors", i.name);
    const bool trailing = TYPE != TF32 && w.lane(i.at[i.count - 1])[0];
    float a[16][K], b[N][K];
    if (registers) {
      rows_of<TYPE>(w, i.at + REGISTERS, a);
    } else {
      const bool leading = TYPE != TF32 && w.lane(rest[4])[0];
      const Matrix from(w.lane(i.at[REGISTERS])[0], leading, i.name);
      p.operands.push_back({from, w.number % 4 * 16, 16, i.name, read_again<TYPE>, {}});
      p.operands.back().read(w, p.operands.back(), &a[0][0]);
    }
    p.operands.push_back(
        {Matrix(w.lane(rest[0])[0], trailing, i.name), 0, N, i.name, read_again<TYPE>, {}});
    p.operands.back().read(w, p.operands.back(), &b[0][0]);
    const bool adds = w.lane(rest[1])[0] != 0;
    for (int r = 0; r < REGISTERS; ++r) {
      uint64_t* d = w.lane(i.at[r]);
      for (int l = 0; l < LANES; ++l)
        d[l] = put(summed<K>(adds ? get<float>(d[l]) : 0.f, a[l / 4 + 8 * (r / 2 % 2)],
                             b[r / 4 * 8 + l % 4 * 2 + r % 2]));
    }
    w.products.push_back(std::move(p));
  }
};
inline void group_commit(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  ++w.committed;
}
inline void group_wait(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  const uint64_t left = w.lane(i.at[0])[0];
  std::vector<Product> open;
  for (Product& p : w.products)
    if (p.group + left >= w.committed)
      open.push_back(std::move(p));
    else
      for (InShared& o : p.operands) o.read(w, o, nullptr);
  w.products = std::move(open);
}

template <Operand TYPE>
void add_products(Table& t, const std::string& type) {
  const std::string k = "k" + std::to_string(DEPTH<TYPE>) + ".f32." + type + "." + type;
  const std::string form = "wgmma.mma_async.sync.aligned.m64n";
  t[form + "8" + k] = GroupProduct<TYPE, 8>::issue;
  t[form + "16" + k] = GroupProduct<TYPE, 16>::issue;
  t[form + "32" + k] = GroupProduct<TYPE, 32>::issue;
  t[form + "64" + k] = GroupProduct<TYPE, 64>::issue;
  t[form + "128" + k] = GroupProduct<TYPE, 128>::issue;
}
inline void add_warp_group(Table& t) {
  t["wgmma.fence.sync.aligned"] = nothing;
  t["wgmma.commit_group.sync.aligned"] = group_commit;
  t["wgmma.wait_group.sync.aligned"] = group_wait;
  add_products<BF16>(t, "bf16");
  add_products<F16>(t, "f16");
  add_products<TF32>(t, "tf32");
}
}  // namespace ptx
