#include "pages.h"

#include <cstdint>
#include <cstdlib>
#include <new>

// AddressSanitizer sees the end of a block only if its malloc made it.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define LASEM_FAST_MAPS 1
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lasem_fast {
namespace {

size_t rounded_up(size_t bytes, size_t grain) { return (bytes + grain - 1) / grain * grain; }

}  // namespace

#if defined(LASEM_FAST_MAPS)

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t mapped_bytes(size_t bytes) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return rounded_up(bytes, page);
}

void* mapped(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return data;
}

}  // namespace

void* take_pages(size_t bytes) {
  bytes = mapped_bytes(bytes);
  if (bytes < kHugePage) return mapped(bytes);
  // A mapping begins at any page: take more, and give back what lies around a huge page's edge.
  const size_t whole = bytes + kHugePage;
  char* begin = static_cast<char*>(mapped(whole));
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  char* data = begin + before;
  if (before) munmap(begin, before);
  if (whole - before > bytes) munmap(data + bytes, whole - before - bytes);
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

void give_pages_back(void* data, size_t bytes) {
  if (data) munmap(data, mapped_bytes(bytes));
}

#else

void* take_pages(size_t bytes) {
  void* data = std::aligned_alloc(64, rounded_up(bytes, 64));
  if (!data) throw std::bad_alloc();
  return data;
}

void give_pages_back(void* data, size_t) { std::free(data); }

#endif

}  // namespace lasem_fast
