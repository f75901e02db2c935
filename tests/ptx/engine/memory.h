// Global and shared memory that know who has touched them.
#pragma once
#include <algorithm>
#include <map>
#include <memory>

#include "machine.h"

namespace ptx {
// The tensors of a launch. Every access has to lie inside one of them; no block may read what
// another one writes, nor write what another one reads or writes, unless it has seen that the other
// one is done with it: by adding to a number to which that one had added before, with a barrier of
// its threads behind what they did, and another one here behind the addition.
struct Global {
  struct Span {
    uint64_t begin, end;
    size_t region;
  };
  struct Region {
    uint64_t begin, end;
    std::vector<uint32_t> writer, reader;  // block + 1, 0 for none, or ATOMIC
    std::vector<uint32_t> written;         // in which epoch of the writer's
  };
  // Of a block that another one has seen: the epoch that has not been, and since when of its own.
  struct Sight {
    uint32_t before, since;
  };
  using Sights = std::map<uint32_t, Sight>;
  static constexpr uint32_t SEVERAL = ~0u, ATOMIC = ~0u - 1;
  std::vector<Span> spans;
  std::vector<Region> regions;
  std::map<uint64_t, Sights> arrived;  // by the number's address
  Sights seen;                         // by the block that is running
  size_t last = 0;

  void give(const uint64_t* begins, const uint64_t* ends, int count) {
    for (int i = 0; i < count; ++i)
      if (begins[i] < ends[i]) spans.push_back({begins[i], ends[i], 0});
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    for (Span& span : spans) {  // tensors may be views of the same memory
      if (regions.empty() || regions.back().end <= span.begin)
        regions.push_back({span.begin, span.end, {}, {}});
      regions.back().end = std::max(regions.back().end, span.end);
      span.region = regions.size() - 1;
    }
    for (Region& r : regions) {
      r.writer.assign(r.end - r.begin, 0);
      r.reader.assign(r.end - r.begin, 0);
      r.written.assign(r.end - r.begin, 0);
    }
  }
  Region& find(uint64_t at, size_t size, const char* name, size_t alignment) {
    if (at % alignment) fail("%s: address not a multiple of %zu bytes", name, alignment);
    for (size_t i = 0; i < spans.size(); ++i) {
      const Span& s = spans[(last + i) % spans.size()];
      if (s.begin <= at && at + size <= s.end) {
        last = (last + i) % spans.size();
        return regions[s.region];
      }
    }
    long nearest = 0;
    for (const Span& s : spans) {
      const long off = at < s.begin ? long(at - s.begin) : long(at + size - s.end);
      if (!nearest || std::labs(off) < std::labs(nearest)) nearest = off;
    }
    fail("%s outside of all tensors, by %ld bytes", name, nearest);
  }
  bool is_seen(const Region& r, uint64_t i, uint32_t epoch) const {
    const auto found = seen.find(r.writer[i] - 1);
    return found != seen.end() && r.written[i] < found->second.before &&
           found->second.since < epoch;
  }
  void read(void* to, uint64_t at, size_t size, uint32_t block, uint32_t epoch, const char* name,
            size_t alignment = 0) {
    Region& r = find(at, size, name, alignment ? alignment : size);
    for (uint64_t i = at - r.begin; i < at - r.begin + size; ++i) {
      if (r.writer[i] == ATOMIC) fail("%s reads what is changed by atomics", name);
      if (r.writer[i] && r.writer[i] != block + 1 && !is_seen(r, i, epoch))
        fail("%s reads what block %u has written", name, r.writer[i] - 1);
      uint32_t& reader = r.reader[i];
      reader = !reader || reader == block + 1 ? block + 1 : SEVERAL;
    }
    memcpy(to, (const void*)at, size);
  }
  void write(uint64_t at, const void* from, size_t size, uint32_t block, uint32_t epoch,
             const char* name) {
    Region& r = find(at, size, name, size);
    for (uint64_t i = at - r.begin; i < at - r.begin + size; ++i) {
      if (r.writer[i] == ATOMIC) fail("%s writes what is changed by atomics", name);
      if (r.writer[i] && r.writer[i] != block + 1)
        fail("%s writes what block %u has written", name, r.writer[i] - 1);
      if (r.reader[i] && r.reader[i] != block + 1)
        fail("%s writes what another block has read", name);
      r.writer[i] = block + 1;
      r.written[i] = epoch;
    }
    memcpy((void*)at, from, size);
  }
  // The running block adds to a number: it sees all who have, and those who will see it.
  void arrive(uint64_t at, uint32_t block, uint32_t epoch) {
    Sights& here = arrived[at];
    for (const auto& [other, sight] : here) {
      Sight& known = seen.insert({other, {0, epoch}}).first->second;
      if (sight.before > known.before) known = {sight.before, epoch};
    }
    here[block] = {epoch, 0};
    for (const auto& [other, sight] : seen)
      if (other != block) here[other].before = std::max(here[other].before, sight.before);
  }
  // What blocks change by atomics alone belongs to all of them.
  void share(uint64_t at, size_t size, const char* name) {
    Region& r = find(at, size, name, size);
    for (uint64_t i = at - r.begin; i < at - r.begin + size; ++i) {
      if (r.reader[i] || (r.writer[i] && r.writer[i] != ATOMIC))
        fail("%s of what is read or written without atomics", name);
      r.writer[i] = ATOMIC;
    }
  }
};

// One block's shared memory. Threads are ordered by barriers of the block and of the warp alone:
// whatever two threads do to a byte without one between them is a race, in whatever order it ran.
struct Shared {
  static constexpr uint16_t NOBODY = 0xffff, SEVERAL = 0xfffe;
  struct Byte {
    uint32_t written = 0, written_warp = 0, read = 0, read_warp = 0;  // epochs
    uint16_t writer = NOBODY, reader = NOBODY, reader_warp = NOBODY;
    bool in_flight = false, reserved = false;  // reserved: for an mbarrier
    uint32_t barrier = 0, phase = 0;           // mbarrier + 1 whose phase brought it, or 0
    uint64_t stored = 0, loaded = 0;           // when, by an ordinary store or load
    uint16_t loader = 0;                       // and by which warp
  };
  std::vector<unsigned char> data;
  std::vector<Byte> bytes;
  uint32_t epoch = 0;
  uint64_t clock = 0;
  std::vector<uint64_t> fenced;  // when each warp last had a fence between ordinary accesses and
                                 // those of products of warp groups and of tensor copies

  Shared(uint32_t size, size_t warps)
      : data(size, 0xff), bytes(size), fenced(warps) {}  // NaN in every float type
  void inside(uint64_t at, size_t size, const char* name, size_t alignment = 0) const {
    if (!alignment) alignment = size;
    if (at % alignment) fail("%s: shared address %lu not a multiple of %zu", name, at, alignment);
    if (at + size > data.size()) fail("%s past the %zu bytes of shared", name, data.size());
  }
  void read(const Warp& w, int lane, void* to, uint64_t at, size_t size, const char* name) {
    inside(at, size, name);
    const uint16_t thread = uint16_t(w.number * LANES + lane);
    for (Byte* b = &bytes[at]; b != &bytes[at] + size; ++b) {
      if (b->in_flight) fail("%s reads what a copy is still writing", name);
      check_seen(w, *b, name);
      if (b->writer != thread && b->writer != NOBODY && b->written == epoch &&
          (b->writer / LANES != w.number || b->written_warp == w.epoch))
        fail("%s: no barrier after the write by thread %u", name, b->writer);
      if (b->reader == NOBODY || b->read != epoch) {
        b->reader = thread;
        b->reader_warp = uint16_t(w.number);
      } else {
        if (b->reader != thread) b->reader = SEVERAL;
        if (b->reader_warp != w.number) b->reader_warp = SEVERAL;
      }
      b->read = epoch;
      b->read_warp = w.epoch;
    }
    memcpy(to, &data[at], size);
  }
  void write(const Warp& w, int lane, uint64_t at, const void* from, size_t size, const char* name,
             size_t alignment = 0) {
    inside(at, size, name, alignment);
    const uint16_t thread = uint16_t(w.number * LANES + lane);
    const unsigned char* values = (const unsigned char*)from;
    for (size_t i = 0; i < size; ++i) {
      Byte& b = bytes[at + i];
      if (b.in_flight) fail("%s writes what a copy is still writing", name);
      check_seen(w, b, name);
      if (b.writer != thread && b.writer != NOBODY && b.written == epoch &&
          (b.writer / LANES != w.number || b.written_warp == w.epoch) && data[at + i] != values[i])
        fail("%s: no barrier after the write by thread %u", name, b.writer);
      if (b.reader != thread && b.reader != NOBODY && b.read == epoch &&
          (b.reader_warp != w.number || b.read_warp == w.epoch) && data[at + i] != values[i])
        fail("%s: no barrier after a read", name);
      b.writer = thread;
      b.stored = 0;
      b.barrier = 0;
      b.written = epoch;
      b.written_warp = w.epoch;
    }
    memcpy(&data[at], from, size);
  }
  void mark_stored(uint64_t at, size_t size) {
    ++clock;
    for (size_t i = 0; i < size; ++i) bytes[at + i].stored = clock;
  }
  void mark_loaded(const Warp& w, uint64_t at, size_t size) {
    ++clock;
    for (size_t i = 0; i < size; ++i) {
      bytes[at + i].loaded = clock;
      bytes[at + i].loader = uint16_t(w.number);
    }
  }
  void fence(const Warp& w) { fenced[w.number] = ++clock; }
  // Products and copies pass ordinary stores that no fence of the storing or of their own warp
  // follows.
  void check_fence(const Warp& w, uint64_t at, size_t size, const char* name) const {
    for (size_t i = 0; i < size; ++i) {
      const Byte& b = bytes[at + i];
      if (b.stored && std::max(fenced[b.writer / LANES], fenced[w.number]) < b.stored)
        fail("%s: no proxy fence after the store by thread %u", name, b.writer);
    }
  }
  // Likewise a copy over what was loaded.
  void check_fence_of_loads(const Warp& w, uint64_t at, size_t size, const char* name) const {
    for (size_t i = 0; i < size; ++i) {
      const Byte& b = bytes[at + i];
      if (std::max(fenced[b.loader], fenced[w.number]) < b.loaded)
        fail("%s: no proxy fence after a load by warp %u", name, unsigned(b.loader));
    }
  }
  // What tensor copies bring is there for those who have seen that phase of their mbarrier end.
  void land(uint64_t at, const unsigned char* values, size_t size, uint32_t barrier,
            uint32_t phase) {
    for (size_t i = 0; i < size; ++i) {
      Byte& b = bytes[at + i];
      b.in_flight = false;
      b.writer = NOBODY;
      b.barrier = barrier + 1;
      b.phase = phase;
    }
    memcpy(&data[at], values, size);
  }
  void check_seen(const Warp& w, const Byte& b, const char* name) const {
    if (b.reserved) fail("%s of an mbarrier's memory", name);
    if (b.barrier && (w.seen.size() < b.barrier || w.seen[b.barrier - 1] <= b.phase))
      fail("%s: no wait for the copy that wrote it", name);
  }
  void reserve(uint64_t at, size_t size, bool reserved) {
    for (size_t i = 0; i < size; ++i) bytes[at + i].reserved = reserved;
  }
  void fly(uint64_t at, size_t size, bool in_flight) {
    for (size_t i = 0; i < size; ++i) bytes[at + i].in_flight = in_flight;
  }
};

struct Machine {
  const unsigned char* parameters;
  Global* global;
  Shared* shared;
  Barriers* barriers;
  std::vector<Warp>* warps;
  uint32_t block, parameter_bytes, elected;  // elected: the lane that is, whoever is asked
};
}  // namespace ptx
