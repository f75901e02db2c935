// A program, and launches of it; the interface that Python sees.
#include <deque>
#include <random>

#include "memory_instructions.h"
#include "tensor_copies.h"
#include "warp_group.h"
#include "warp_instructions.h"

namespace ptx {
namespace {
const Table& table() {
  static const Table known = [] {
    Table t;
    add_arithmetic(t);
    add_memory(t);
    add_warp(t);
    add_warp_group(t);
    add_barriers(t);
    add_tensor_copies(t);
    return t;
  }();
  return known;
}

struct Constant {
  int reg;
  uint64_t value;
};
struct Program {
  std::vector<Instruction> instructions;
  std::vector<int> operands;
  std::deque<std::string> names;
  std::vector<Constant> constants;
  std::vector<int> special;  // registers of tid.x to nctaid.z and laneid, or -1
  int registers, threads;
};
struct Grid {
  uint32_t x, y, z;
};

void begin(Warp& w, const Program& p, Machine& machine, uint32_t number, Grid size, Grid at) {
  w.machine = &machine;
  w.file.assign(size_t(p.registers) * LANES, 0xffffffffffffffff);  // NaN in every float type
  w.groups.assign(1, {ALL, 0, false});
  w.lanes = {};
  w.products.clear();
  w.committed = 0;
  w.seen.clear();
  w.number = number;
  w.epoch = 0;
  w.live = ALL;
  w.waits = w.polls = false;
  for (const Constant& c : p.constants)
    for (int l = 0; l < LANES; ++l) w.lane(c.reg)[l] = c.value;
  const uint32_t known[] = {0,      0,      0,     uint32_t(p.threads), 1, 1, at.x, at.y, at.z,
                            size.x, size.y, size.z};
  for (int s = 0; s < 13; ++s)
    if (p.special[s] >= 0)
      for (uint32_t l = 0; l < LANES; ++l)
        w.lane(p.special[s])[l] = s == 12 ? l : s == 0 ? number * LANES + l : known[s];
}

// The group that is furthest behind among those that can go on, with all that are at its place.
Group* next_group(Warp& w) {
  for (;;) {
    Group* first = nullptr;
    for (Group& g : w.groups)
      if (!g.parked && (!first || g.at < first->at)) first = &g;
    if (!first) fail("lanes of a warp wait for each other");
    const int at = first->at;
    uint32_t mask = 0;
    for (Group& g : w.groups)
      if (g.at == at) mask |= g.mask, g.mask = 0;
    w.groups.erase(
        std::remove_if(w.groups.begin(), w.groups.end(), [](const Group& g) { return !g.mask; }),
        w.groups.end());
    w.groups.push_back({mask, at, false});
    return &w.groups.back();
  }
}
bool of_all_lanes(const Instruction& i) { return strstr(i.name, "sync") != nullptr; }

// Runs a warp until it waits at a barrier or for an mbarrier, has ended, or has done so many
// instructions.
void advance(Warp& w, const Program& p, uint64_t most) {
  const Instruction* i = nullptr;
  try {
    for (; most && w.live; --most) {
      Group* g = w.groups.size() == 1 ? &w.groups[0] : next_group(w);
      i = &p.instructions[g->at];
      if (of_all_lanes(*i) && g->mask != w.live) {
        g->parked = true;
        continue;
      }
      uint32_t mask = g->mask;
      if (i->predicate >= 0) {
        const uint64_t* guard = w.lane(i->predicate);
        uint32_t open = 0;
        for (int l = 0; l < LANES; ++l) open |= uint32_t((guard[l] & 1) != i->negated) << l;
        mask &= open;
      }
      w.flow = ONWARD;
      if (mask) i->run(w, *i, mask);
      const uint32_t rest = g->mask & ~mask;
      const int after = g->at + 1;
      if (w.flow == ONWARD || w.flow == BARRIER || w.flow == POLL) {
        g->at = after;
      } else {
        if (w.flow == EXIT) w.live &= ~mask;
        g->mask = w.flow == EXIT ? 0 : mask;
        g->at = w.to;
        if (rest) w.groups.push_back({rest, after, false});
        if (!w.groups.empty() && w.flow == EXIT) {
          w.groups.erase(std::remove_if(w.groups.begin(), w.groups.end(),
                                        [](const Group& g) { return !g.mask; }),
                         w.groups.end());
        }
      }
      if (w.groups.size() > 1)
        for (Group& other : w.groups) other.parked = false;
      if (w.flow == BARRIER || w.flow == POLL) {
        (w.flow == POLL ? w.polls : w.waits) = true;
        return;
      }
    }
  } catch (const Fault& fault) {
    fail("warp %u, line %d: %s", w.number, i ? i->line : 0, fault.what());
  }
}

void run_block(std::vector<Warp>& warps, const Program& p, Shared& shared, Barriers& barriers,
               std::mt19937* random) {
  for (;;) {
    std::vector<Warp*> ready;
    size_t live = 0;
    bool polls = false;
    for (Warp& w : warps) {
      live += w.live != 0;
      w.polls = w.polls && w.polled == barriers.clock;
      polls |= w.polls;
      if (w.live && !w.waits && !w.polls) ready.push_back(&w);
    }
    if (!live) return barriers.check_none_in_flight();
    if (ready.empty()) {
      if (polls) fail("all warps wait, some for an mbarrier whose phase never ends");
      ++shared.epoch;
      share_what_is_seen(warps);
      for (Warp& w : warps) w.waits = false;
    } else if (random) {
      advance(*ready[(*random)() % ready.size()], p, 1 + (*random)() % 64);
    } else {
      advance(*ready[0], p, ~uint64_t(0));
    }
  }
}
}  // namespace
}  // namespace ptx

extern "C" {
// One instruction: predicate, negated, line, number of operands, operands.
ptx::Program* ptx_program(const char* const* names, const int* words, int instructions,
                          const int* constants, const uint64_t* values, int constant_count,
                          const int* special, int registers, int threads, char* error, int room) {
  auto* p = new ptx::Program;
  p->registers = registers;
  p->threads = threads;
  for (int c = 0; c < constant_count; ++c) p->constants.push_back({constants[c], values[c]});
  p->special.assign(special, special + 13);
  std::vector<size_t> offsets;
  std::string unknown;
  for (int n = 0; n < instructions; ++n) {
    p->names.emplace_back(names[n]);
    const auto found = ptx::table().find(names[n]);
    if (found == ptx::table().end()) {
      if (unknown.find(p->names.back() + ";") == std::string::npos)
        unknown += p->names.back() + "; ";
      words += 4 + words[3];
      continue;
    }
    offsets.push_back(p->operands.size());
    p->operands.insert(p->operands.end(), words + 4, words + 4 + words[3]);
    p->instructions.push_back({found->second, p->names.back().c_str(), words[0], words[1] != 0,
                               words[2], words[3], nullptr});
    words += 4 + words[3];
  }
  if (!unknown.empty()) {
    snprintf(error, size_t(room), "no such instructions: %s", unknown.c_str());
    delete p;
    return nullptr;
  }
  for (size_t n = 0; n < p->instructions.size(); ++n)
    p->instructions[n].at = p->operands.data() + offsets[n];
  return p;
}
void ptx_free(ptx::Program* p) { delete p; }

// 0, or 1 with a message. seed 0: blocks and warps in order; else both in a drawn order.
int ptx_launch(const ptx::Program* p, const uint32_t* grid, uint32_t shared_bytes,
               const unsigned char* parameters, uint32_t parameter_bytes, const uint64_t* begins,
               const uint64_t* ends, int spans, uint32_t seed, char* error, int room) {
  std::mt19937 random(seed);
  const ptx::Grid size{grid[0], grid[1], grid[2]};
  std::vector<uint32_t> order(size_t(size.x) * size.y * size.z);
  for (size_t b = 0; b < order.size(); ++b) order[b] = uint32_t(b);
  if (seed) std::shuffle(order.begin(), order.end(), random);
  const uint32_t elected = seed ? uint32_t(random() % ptx::LANES) : 0;
  ptx::Global global;
  global.give(begins, ends, spans);
  std::vector<ptx::Warp> warps(size_t(p->threads) / ptx::LANES);
  for (const uint32_t b : order) {
    global.seen.clear();
    const ptx::Grid at{b % size.x, b / size.x % size.y, b / size.x / size.y};
    try {
      ptx::Shared shared(shared_bytes, warps.size());
      ptx::Barriers barriers(shared);
      ptx::Machine machine{parameters, &global, &shared,         &barriers,
                           &warps,     b,       parameter_bytes, elected};
      for (size_t w = 0; w < warps.size(); ++w)
        ptx::begin(warps[w], *p, machine, uint32_t(w), size, at);
      ptx::run_block(warps, *p, shared, barriers, seed ? &random : nullptr);
    } catch (const ptx::Fault& fault) {
      snprintf(error, size_t(room), "block (%u, %u, %u), %s", at.x, at.y, at.z, fault.what());
      return 1;
    }
  }
  return 0;
}
}
