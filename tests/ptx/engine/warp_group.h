// Products of warp groups (wgmma): every warp computes its own 16 of 64 rows. Descriptors are
// sampled at the issue; what they point to, and the registers of a and d, belong to the product
// until the wait, and are read at either of the two, as the launch asks for.
#pragma once
#include <utility>

#include "warp_instructions.h"

namespace ptx {
// A matrix in shared memory by its descriptor: K-major rows, or columns one after another.
struct Matrix {
    uint32_t start, leading, stride, width;  // width: of the swizzle, in bytes
    bool columns;

    Matrix(uint64_t bits, bool columns, const char* name)
        : start(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4),
          stride(uint32_t(bits >> 32 & 0x3fff) << 4), columns(columns) {
        static const uint32_t widths[] = {16, 128, 64, 32};
        width = widths[bits >> 62];
        if (bits >> 49 & 7) fail("%s: descriptor with a base offset", name);
    }
    // Where element (row, k) of `size` bytes lies.
    uint32_t address(uint32_t row, uint32_t k, uint32_t size) const {
        uint32_t at;
        if (columns) {
            const uint32_t wide = width / size;
            // without a swizzle the two strides change places
            const uint32_t over = width == 16 ? stride : leading;
            const uint32_t down = width == 16 ? leading : stride;
            at = start + row % wide * size + row / wide * over + k % 8 * width + k / 8 * down;
        } else if (width == 16) {
            const uint32_t wide = 16 / size;
            at = start + row / 8 * stride + row % 8 * 16 + k / wide * leading + k % wide * size;
        } else {
            at = start + row / 8 * stride + row % 8 * width + k * size;
        }
        return at ^ (at >> 7 & (width / 16 - 1)) << 4;
    }
};
template <Operand TYPE>
void read_rows(Warp& w, const Matrix& from, uint32_t first, int count, float (*to)[DEPTH<TYPE>],
               const char* name) {
    constexpr uint32_t SIZE = TYPE == TF32 ? 4 : 2;
    for (int r = 0; r < count; ++r)
        for (uint32_t k = 0; k < uint32_t(DEPTH<TYPE>); ++k) {
            uint32_t bits = 0;
            w.machine->shared->read(w, r % LANES, &bits, from.address(first + uint32_t(r), k, SIZE),
                                    SIZE, name);
            to[r][k] = decoded<TYPE>(bits, 0);
        }
}

// Operands: d, a (4 registers or a descriptor), b, whether d is added to, 1, 1, and which of a and
// b in shared memory are columns (16-bit types only).
template <Operand TYPE, int N> struct GroupProduct {
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
        Product p{&i, run, w.committed, false, 0, 0, w.lane(rest[0])[0], w.lane(rest[1])[0] != 0};
        for (int l = 1; l < LANES; ++l)
            if (w.lane(rest[0])[l] != p.b) fail("%s: lanes with other descriptors", i.name);
        if (!registers) p.a = w.lane(i.at[REGISTERS])[0];
        if (TYPE != TF32)
            p.columns = (registers ? 0 : w.lane(rest[4])[0] << 1) | w.lane(i.at[i.count - 1])[0];
        if (!w.machine->late) run(w, p);
        p.done = !w.machine->late;
        w.products.push_back(p);
    }
    static void run(Warp& w, const Product& p) {
        const Instruction& i = *p.instruction;
        float a[16][K], b[N][K];
        if (from_registers(i))
            rows_of<TYPE>(w, i.at + REGISTERS, a);
        else
            read_rows<TYPE>(w, Matrix(p.a, p.columns & 2, i.name), w.number % 4 * 16, 16, a, i.name);
        read_rows<TYPE>(w, Matrix(p.b, p.columns & 1, i.name), 0, N, b, i.name);
        for (int r = 0; r < REGISTERS; ++r) {
            uint64_t* d = w.lane(i.at[r]);
            for (int l = 0; l < LANES; ++l)
                d[l] = put(summed<K>(p.adds ? get<float>(d[l]) : 0.f, a[l / 4 + 8 * (r / 2 % 2)],
                                     b[r / 4 * 8 + l % 4 * 2 + r % 2]));
        }
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
    for (const Product& p : w.products)
        if (p.group + left >= w.committed)
            open.push_back(p);
        else if (!p.done)
            p.run(w, p);
    w.products = std::move(open);
}

template <Operand TYPE> void add_products(Table& t, const std::string& type) {
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
