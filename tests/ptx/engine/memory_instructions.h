// Loads, stores, cp.async, ldmatrix and stmatrix.
#pragma once
#include "memory.h"

namespace ptx {
enum Space { GLOBAL, SHARED, PARAMETER };

template <Space SPACE, class T, int N>
void load(Warp& w, const Instruction& i, uint32_t mask) {
  Machine& m = *w.machine;
  if constexpr (SPACE == PARAMETER) {
    const uint32_t from = uint32_t(i.at[1]);
    if (from + sizeof(T) > m.parameter_bytes) fail("%s past the parameters", i.name);
    T value;
    memcpy(&value, m.parameters + from, sizeof value);
    each(mask, [&](int l) { w.lane(i.at[0])[l] = put(value); });
  } else {
    const uint64_t* base = w.lane(i.at[N]);
    const int64_t offset = i.at[N + 1];
    each(mask, [&](int l) {
      T values[N];
      if constexpr (SPACE == GLOBAL)
        m.global->read(values, base[l] + offset, sizeof values, m.block, m.shared->epoch, i.name);
      else
        m.shared->read(w, l, values, uint32_t(base[l]) + offset, sizeof values, i.name),
            m.shared->mark_loaded(w, uint32_t(base[l]) + offset, sizeof values);
      for (int n = 0; n < N; ++n) w.lane(i.at[n])[l] = put(values[n]);
    });
  }
}

template <Space SPACE, class T, int N>
void store(Warp& w, const Instruction& i, uint32_t mask) {
  Machine& m = *w.machine;
  const uint64_t* base = w.lane(i.at[0]);
  const int64_t offset = i.at[1];
  each(mask, [&](int l) {
    T values[N];
    for (int n = 0; n < N; ++n) values[n] = get<T>(w.lane(i.at[2 + n])[l]);
    if constexpr (SPACE == GLOBAL)
      m.global->write(base[l] + offset, values, sizeof values, m.block, m.shared->epoch, i.name);
    else
      m.shared->write(w, l, uint32_t(base[l]) + offset, values, sizeof values, i.name),
          m.shared->mark_stored(uint32_t(base[l]) + offset, sizeof values);
  });
}

// The source is read at the issue; until the wait the destination belongs to the copy.
template <int SIZE_MOST>
void copy_async(Warp& w, const Instruction& i, uint32_t mask) {
  Machine& m = *w.machine;
  each(mask, [&](int l) {
    const uint32_t size = uint32_t(w.lane(i.at[4])[l]);
    const uint32_t given = i.count > 5 ? uint32_t(w.lane(i.at[5])[l]) : size;
    if (size > SIZE_MOST || (size != 4 && size != 8 && size != 16) || given > size)
      fail("%s: sizes %u and %u", i.name, size, given);
    Copy copy{uint32_t(w.lane(i.at[0])[l]) + i.at[1], size, {}};
    if (given && given != size) fail("%s: part of a copy", i.name);
    if (given)
      m.global->read(copy.data, w.lane(i.at[2])[l] + i.at[3], size, m.block, m.shared->epoch,
                     i.name);
    unsigned char poison[16];
    memset(poison, 0xff, sizeof poison);
    m.shared->write(w, l, copy.to, poison, size, i.name);
    m.shared->fly(copy.to, size, true);
    w.lanes[l].copies.push_back(copy);
  });
}
inline void copy_commit(Warp& w, const Instruction&, uint32_t mask) {
  each(mask, [&](int l) { w.lanes[l].groups.push_back(w.lanes[l].copies.size()); });
}
// All but the last few groups; copies after the last commit stay in flight.
inline void copy_wait(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    auto& [copies, groups] = w.lanes[l];
    const uint64_t left = w.lane(i.at[0])[l];
    if (groups.size() <= left) return;
    const size_t done = groups.size() - left, end = groups[done - 1];
    for (size_t c = 0; c < end; ++c) {
      w.machine->shared->fly(copies[c].to, copies[c].size, false);
      w.machine->shared->write(w, l, copies[c].to, copies[c].data, copies[c].size, i.name);
    }
    copies.erase(copies.begin(), copies.begin() + long(end));
    groups.erase(groups.begin(), groups.begin() + long(done));
    for (size_t& g : groups) g -= end;
  });
}

// The value before, and the larger one, or the sum, in its place.
template <class T, bool ADDS>
void atomic(Warp& w, const Instruction& i, uint32_t mask) {
  const Machine& m = *w.machine;
  each(mask, [&](int l) {
    const uint64_t at = w.lane(i.at[1])[l] + uint64_t(int64_t(i.at[2]));
    m.global->share(at, sizeof(T), i.name);
    if (ADDS) m.global->arrive(at, m.block, m.shared->epoch);
    T& value = *reinterpret_cast<T*>(at);
    const T before = value, given = get<T>(w.lane(i.at[3])[l]);
    value = ADDS ? T(before + given) : std::max(before, given);
    w.lane(i.at[0])[l] = put(before);
  });
}

// Lane i names row i of N 8x8 matrices of 16 bits; a lane gets elements (lane / 4, lane % 4 * 2 +
// 0..1) of each, or those of the transpose.
template <int N, bool TRANSPOSED>
void load_matrix(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  uint16_t rows[N * 8][8];
  for (int r = 0; r < N * 8; ++r) {
    const uint32_t at = uint32_t(w.lane(i.at[N])[r]) + i.at[N + 1];
    w.machine->shared->read(w, r, rows[r], at, 16, i.name);
    w.machine->shared->mark_loaded(w, at, 16);
  }
  for (int n = 0; n < N; ++n)
    for (int l = 0; l < LANES; ++l) {
      uint32_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = l / 4, column = l % 4 * 2 + e;
        pair[e] = TRANSPOSED ? rows[n * 8 + column][row] : rows[n * 8 + row][column];
      }
      w.lane(i.at[n])[l] = pair[0] | pair[1] << 16;
    }
}
template <int N, bool TRANSPOSED>
void store_matrix(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  uint16_t rows[N * 8][8];
  for (int n = 0; n < N; ++n)
    for (int l = 0; l < LANES; ++l)
      for (int e = 0; e < 2; ++e) {
        const int row = l / 4, column = l % 4 * 2 + e;
        const uint16_t value = uint16_t(w.lane(i.at[2 + n])[l] >> 16 * e);
        (TRANSPOSED ? rows[n * 8 + column][row] : rows[n * 8 + row][column]) = value;
      }
  for (int r = 0; r < N * 8; ++r) {
    const uint32_t at = uint32_t(w.lane(i.at[0])[r]) + i.at[1];
    w.machine->shared->write(w, r, at, rows[r], 16, i.name);
    w.machine->shared->mark_stored(at, 16);
  }
}

template <class T>
void add_space(Table& t, const std::string& type) {
  t["ld.param." + type] = load<PARAMETER, T, 1>;
  t["ld.global." + type] = load<GLOBAL, T, 1>;
  t["ld.global.v2." + type] = load<GLOBAL, T, 2>;
  t["ld.shared." + type] = load<SHARED, T, 1>;
  t["ld.shared.v2." + type] = load<SHARED, T, 2>;
  t["st.global." + type] = store<GLOBAL, T, 1>;
  t["st.global.v2." + type] = store<GLOBAL, T, 2>;
  t["st.shared." + type] = store<SHARED, T, 1>;
  t["st.shared.v2." + type] = store<SHARED, T, 2>;
  if constexpr (sizeof(T) < 8) {
    t["ld.global.v4." + type] = load<GLOBAL, T, 4>;
    t["ld.shared.v4." + type] = load<SHARED, T, 4>;
    t["st.global.v4." + type] = store<GLOBAL, T, 4>;
    t["st.shared.v4." + type] = store<SHARED, T, 4>;
  }
}
template <int N>
void add_matrix(Table& t) {
  const std::string form = ".sync.aligned.m8n8.x" + std::to_string(N);
  t["ldmatrix" + form + ".shared.b16"] = load_matrix<N, false>;
  t["ldmatrix" + form + ".trans.shared.b16"] = load_matrix<N, true>;
  t["stmatrix" + form + ".shared.b16"] = store_matrix<N, false>;
  t["stmatrix" + form + ".trans.shared.b16"] = store_matrix<N, true>;
}
inline void add_memory(Table& t) {
  add_space<uint8_t>(t, "b8");
  add_space<uint16_t>(t, "b16");
  add_space<uint32_t>(t, "b32");
  add_space<uint64_t>(t, "b64");
  t["ld.shared.s32"] = load<SHARED, uint32_t, 1>;
  t["ld.param.s32"] = load<PARAMETER, uint32_t, 1>;
  t["cp.async.ca.shared.global"] = t["cp.async.cg.shared.global"] = copy_async<16>;
  t["atom.global.gpu.acq_rel.max.s32"] = atomic<int32_t, false>;
  t["atom.global.gpu.acq_rel.add.u32"] = atomic<uint32_t, true>;
  t["cp.async.commit_group"] = copy_commit;
  t["cp.async.wait_group"] = copy_wait;
  add_matrix<1>(t);
  add_matrix<2>(t);
  add_matrix<4>(t);
}
}  // namespace ptx
