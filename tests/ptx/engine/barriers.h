// Barriers in shared memory (mbarrier) that count threads and the bytes of tensor copies. A phase
// ends when all have come; the bytes of a copy come no sooner than somebody waits for them, and who
// has not seen the phase end, or met a thread at a barrier of the block that has, must not read.
#pragma once
#include <map>
#include <memory>

#include "memory.h"

namespace ptx {
// A tensor copy between its issue and the end of the phase that counts its bytes.
struct Flight {
  uint32_t to;
  std::vector<unsigned char> data;
};
struct Barriers {
  struct Barrier {
    uint32_t number, count, pending;
    int64_t bytes = 0;   // that are still expected
    uint32_t phase = 0;  // that is not over yet
    std::vector<Flight> flights;
  };
  Shared& shared;
  std::map<uint32_t, Barrier> at;
  uint32_t made = 0;
  uint64_t clock = 0;  // how often anything has changed that somebody might wait for

  explicit Barriers(Shared& shared) : shared(shared) {}
  Barrier& find(const Warp& w, int lane, uint32_t address, const char* name) {
    const auto found = at.find(address);
    if (found == at.end()) fail("%s: no mbarrier at %u", name, address);
    uint64_t bits;
    shared.reserve(address, 8, false);
    shared.read(w, lane, &bits, address, 8, name);
    shared.reserve(address, 8, true);
    return found->second;
  }
  void make(const Warp& w, int lane, uint32_t address, uint32_t count, const char* name) {
    if (!count || count >> 20) fail("%s for %u threads", name, count);
    const uint64_t bits = 0;
    shared.write(w, lane, address, &bits, 8, name);
    shared.reserve(address, 8, true);
    at[address] = {made++, count, count};
    ++clock;
  }
  void end(const Warp& w, int lane, uint32_t address, const char* name) {
    if (!find(w, lane, address, name).flights.empty())
      fail("%s with copies that were never waited for", name);
    at.erase(address);
    const uint64_t bits = ~uint64_t(0);
    shared.reserve(address, 8, false);
    shared.write(w, lane, address, &bits, 8, name);
  }
  void expect(Barrier& b, uint32_t bytes, const char* name) {
    b.bytes += bytes;
    if (b.bytes >= 1 << 20) fail("%s: more than 2^20 bytes", name);
  }
  void arrive(Barrier& b, const char* name) {
    if (!b.pending) fail("%s once too often in a phase", name);
    --b.pending;
    ++clock;
    advance(b);
  }
  // Copies come in the order of their issue, until the phase is over.
  void land(Barrier& b) {
    const uint32_t phase = b.phase;
    while (b.phase == phase && !b.flights.empty()) {
      const Flight f = std::move(b.flights.front());
      b.flights.erase(b.flights.begin());
      shared.land(f.to, f.data.data(), f.data.size(), b.number, phase);
      b.bytes -= int64_t(f.data.size());
      ++clock;
      advance(b);
    }
  }
  void advance(Barrier& b) {
    if (b.pending || b.bytes) return;
    ++b.phase;
    b.pending = b.count;
  }
  void check_none_in_flight() const {
    for (const auto& [address, b] : at)
      if (!b.flights.empty()) fail("a copy for the mbarrier at %u was never waited for", address);
  }
};

inline uint32_t barrier_at(Warp& w, const Instruction& i, int operand, int lane) {
  return uint32_t(w.lane(i.at[operand])[lane]) + uint32_t(i.at[operand + 1]);
}
inline void barrier_init(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) {
    w.machine->barriers->make(w, l, barrier_at(w, i, 0, l), uint32_t(w.lane(i.at[2])[l]), i.name);
  });
}
inline void barrier_end(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int l) { w.machine->barriers->end(w, l, barrier_at(w, i, 0, l), i.name); });
}
// Operands: the state, which nobody may ask for, the barrier, and the bytes.
inline void barrier_arrive(Warp& w, const Instruction& i, uint32_t mask) {
  Barriers& all = *w.machine->barriers;
  each(mask, [&](int l) {
    auto& b = all.find(w, l, barrier_at(w, i, 1, l), i.name);
    all.expect(b, uint32_t(w.lane(i.at[3])[l]), i.name);
    all.arrive(b, i.name);
  });
}
// True where the phase of that parity is over: the one before this one, or this one.
inline void barrier_wait(Warp& w, const Instruction& i, uint32_t mask) {
  whole(w, mask, i);
  Barriers& all = *w.machine->barriers;
  const uint32_t address = barrier_at(w, i, 1, __builtin_ctz(mask));
  const uint64_t parity = w.lane(i.at[3])[__builtin_ctz(mask)] & ~uint32_t(0);
  each(mask, [&](int l) {
    if (barrier_at(w, i, 1, l) != address || (w.lane(i.at[3])[l] & ~uint32_t(0)) != parity)
      fail("%s: several mbarriers", i.name);
  });
  if (parity > 1) fail("%s for parity %lu", i.name, parity);
  auto& b = all.find(w, __builtin_ctz(mask), address, i.name);
  if ((b.phase & 1) == parity) all.land(b);
  const bool over = (b.phase & 1) != parity;
  if (over) {
    if (w.seen.size() <= b.number) w.seen.resize(b.number + 1);
    w.seen[b.number] = b.phase;
  } else {
    w.flow = POLL;
    w.polled = all.clock;
  }
  each(mask, [&](int l) { w.lane(i.at[0])[l] = over; });
}
// What any warp has seen, all have that meet it at a barrier of the block.
inline void share_what_is_seen(std::vector<Warp>& warps) {
  std::vector<uint32_t> most;
  for (const Warp& w : warps) {
    most.resize(std::max(most.size(), w.seen.size()));
    for (size_t b = 0; b < w.seen.size(); ++b) most[b] = std::max(most[b], w.seen[b]);
  }
  for (Warp& w : warps) w.seen = most;
}

inline void add_barriers(Table& t) {
  t["mbarrier.init.shared::cta.b64"] = barrier_init;
  t["mbarrier.inval.shared::cta.b64"] = barrier_end;
  t["mbarrier.arrive.expect_tx.shared.b64"] = barrier_arrive;
  t["mbarrier.try_wait.parity.shared.b64"] = barrier_wait;
}
}  // namespace ptx
