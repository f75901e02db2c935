// The machine that runs a program: blocks one after another, their warps in any order, 32 lanes in
// step. Lanes that branch apart go on as groups, the one that is furthest behind first, and meet
// again where they come to the same instruction.
//
// Not modelled: time; the order in which tensor cores add (here a product's sum is rounded once);
// registers of a product of a warp group before its wait; order between blocks beyond none at all;
// what the assembler makes of the PTX; a wait for an mbarrier that gives up before its phase is
// over; whether copies see an mbarrier that has just been made, for which Triton has no fence.
// Clusters, and atomics but a maximum and a sum in global memory, are refused.
#pragma once
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {
constexpr int LANES = 32;
constexpr uint32_t ALL = ~0u;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Fault(text);
}

struct Warp;
struct Instruction {
  using Run = void (*)(Warp&, const Instruction&, uint32_t mask);
  Run run;
  const char* name;
  int predicate;
  bool negated;
  int line, count;
  const int* at;  // operands
};
// What an instruction does besides changing registers and memory.
enum Flow { ONWARD, BRANCH, EXIT, BARRIER, POLL };
using Table = std::unordered_map<std::string, Instruction::Run>;

// A copy to shared memory between its issue and the wait for it.
struct Copy {
  uint32_t to, size;
  unsigned char data[16];
};
struct Lane {
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // how many copies there were at each commit
};
// A matrix in shared memory by its descriptor: K-major rows, or columns one after another.
struct Matrix {
  uint32_t start, leading, stride, width;  // width: of the swizzle, in bytes
  bool columns;

  Matrix(uint64_t bits, bool columns, const char* name)
      : start(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4),
        columns(columns) {
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
// An operand of a product of a warp group: so many rows from one on, and what was read of it, all
// of it between two addresses.
struct InShared {
  Matrix from;
  uint32_t row, count;
  const char* name;
  void (*read)(Warp&, InShared&, float*);
  std::vector<uint32_t> bits;
  uint32_t begin = ~0u, end = 0;
};
// A product of a warp group between its issue and the wait for it.
struct Product {
  size_t group;
  std::vector<InShared> operands;
};
struct Group {
  uint32_t mask;
  int at;
  bool parked;  // waits for other lanes of its warp
};

struct Shared;
struct Global;
struct Barriers;
struct Machine;
struct Warp {
  Machine* machine;
  std::vector<uint64_t> file;
  std::vector<Group> groups;
  std::array<Lane, LANES> lanes;
  std::vector<Product> products;
  size_t committed = 0;        // groups of products
  std::vector<uint32_t> seen;  // phases of every mbarrier, by number, that are over
  uint64_t polled;             // when it last waited for an mbarrier in vain
  uint32_t number, epoch, live;
  Flow flow;
  int to;
  bool waits, polls;

  uint64_t* lane(int reg) { return &file[size_t(reg) * LANES]; }
};

// Register values are the low bytes of 64 bits.
template <class T>
inline T get(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline uint64_t put(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class F>
inline void each(uint32_t mask, F f) {
  if (mask == ALL) {
    for (int l = 0; l < LANES; ++l) f(l);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}
inline void whole(const Warp& w, uint32_t mask, const Instruction& i) {
  if (mask != w.live) fail("%s by lanes %08x of %08x", i.name, mask, w.live);
}
}  // namespace ptx
