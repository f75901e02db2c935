// Copies of boxes of a tensor to shared memory (cp.async.bulk.tensor, tiled). The destination is
// poisoned at the issue and belongs to the copy until the phase of its mbarrier is over.
#pragma once
#include "barriers.h"

namespace ptx {
// What a launch hands over in place of a CUtensorMap; sizes by dimension, the innermost first.
struct TensorMap {
  static constexpr uint32_t MARK = 0x70616d74;
  uint32_t mark, rank, element, swizzle;  // swizzle: bytes of a line, 0 for none
  uint64_t base, shape[5], strides[5];    // strides in bytes
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

// Where the address of a parameter lies among generic ones.
constexpr uint64_t PARAMETERS = uint64_t(1) << 60;
inline void parameter_address(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) { w.lane(i.at[0])[l] = PARAMETERS + w.lane(i.at[1])[l]; });
}
inline TensorMap map_at(const Machine& m, uint64_t address, const char* name) {
  TensorMap map;
  const uint64_t from = address - PARAMETERS;
  if (address < PARAMETERS || from % 64 || from + 128 > m.parameter_bytes)
    fail("%s: not the address of a tensor map", name);
  memcpy(&map, m.parameters + from, sizeof map);
  if (map.mark != TensorMap::MARK) fail("%s: not a tensor map", name);
  return map;
}
// Bits 4 to 6 of an address, as many as the swizzle has, are flipped by those from bit 7 on.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  return swizzle ? address ^ (address >> 7 & (swizzle / 16 - 1)) << 4 : address;
}

// The box from `corner` on as it lies in shared memory from `to` on; zeros outside of the tensor.
inline std::vector<unsigned char> box_of(Machine& m, const TensorMap& map, const int32_t* corner,
                                         uint32_t to, const char* name) {
  const uint32_t line = map.box[0] * map.element;
  uint32_t lines = 1;
  for (uint32_t d = 1; d < map.rank; ++d) lines *= map.box[d];
  std::vector<unsigned char> data(size_t(lines) * line), values(line);
  const int64_t first = std::max<int64_t>(0, -int64_t(corner[0]));
  const int64_t last = std::min<int64_t>(map.box[0], int64_t(map.shape[0]) - corner[0]);
  for (uint32_t n = 0; n < lines; ++n) {
    uint64_t from = map.base;
    bool inside = first < last;
    for (uint32_t d = 1, rest = n; d < map.rank; rest /= map.box[d++]) {
      const int64_t place = int64_t(corner[d]) + rest % map.box[d];
      inside = inside && place >= 0 && place < int64_t(map.shape[d]);
      from += uint64_t(place) * map.strides[d];
    }
    std::fill(values.begin(), values.end(), 0);
    if (inside)
      m.global->read(&values[size_t(first) * map.element],
                     from + uint64_t((corner[0] + first) * map.element),
                     size_t(last - first) * map.element, m.block, m.shared->epoch, name,
                     map.element);
    for (uint32_t b = 0; b < line; b += 16)
      memcpy(&data[swizzled(to + n * line + b, map.swizzle) - to], &values[b], 16);
  }
  return data;
}

// Operands: the destination, the tensor map, RANK coordinates, the mbarrier.
template <int RANK>
void copy_tensor(Warp& w, const Instruction& i, uint32_t mask) {
  Machine& m = *w.machine;
  each(mask, [&](int l) {
    const TensorMap map = map_at(m, w.lane(i.at[2])[l], i.name);
    if (map.rank != RANK) fail("%s of a tensor of %u dimensions", i.name, map.rank);
    const uint32_t to = uint32_t(w.lane(i.at[0])[l]) + uint32_t(i.at[1]);
    if (to % 128) fail("%s to %u, not a multiple of 128", i.name, to);
    int32_t corner[RANK];
    for (int d = 0; d < RANK; ++d) corner[d] = int32_t(w.lane(i.at[3 + d])[l]);
    auto& barrier = m.barriers->find(w, l, barrier_at(w, i, 3 + RANK, l), i.name);
    Flight flight{to, box_of(m, map, corner, to, i.name)};
    const uint32_t size = uint32_t(flight.data.size());
    m.shared->inside(to, 1, i.name);
    m.shared->inside(to + size - 1, 1, i.name);
    m.shared->check_fence(w, to, size, i.name);
    m.shared->check_fence_of_loads(w, to, size, i.name);
    for (const Warp& other : *m.warps)
      for (const Product& p : other.products)
        for (const InShared& o : p.operands)
          if (o.begin < to + size && to < o.end)
            fail("%s writes what a product of warp %u still reads", i.name, other.number);
    const std::vector<unsigned char> poison(size, 0xff);
    m.shared->write(w, l, to, poison.data(), size, i.name, 1);
    m.shared->fly(to, size, true);
    barrier.flights.push_back(std::move(flight));
  });
}

inline void add_tensor_copies(Table& t) {
  const std::string end = ".shared::cluster.global.mbarrier::complete_tx::bytes";
  t["cp.async.bulk.tensor.1d" + end] = copy_tensor<1>;
  t["cp.async.bulk.tensor.2d" + end] = copy_tensor<2>;
  t["cp.async.bulk.tensor.3d" + end] = copy_tensor<3>;
  t["cp.async.bulk.tensor.4d" + end] = copy_tensor<4>;
  t["cp.async.bulk.tensor.5d" + end] = copy_tensor<5>;
  t["cvta.param.u64"] = parameter_address;
}
}  // namespace ptx
