// Subnormal numbers taken for zero while an operator computes.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#define LASEM_FAST_MXCSR 1
#endif

namespace lasem_fast {

// For the scope of one, on its thread. The gradients of improbable configurations, which their
// posteriors shrink, fall below 2^-126, and many CPUs are slow at such numbers.
class SubnormalsAreZero {
 public:
#ifdef LASEM_FAST_MXCSR
  SubnormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kAreZero); }
  ~SubnormalsAreZero() { _mm_setcsr(before_); }
#else
  SubnormalsAreZero() {}
  ~SubnormalsAreZero() {}
#endif
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

#ifdef LASEM_FAST_MXCSR
 private:
  static constexpr unsigned kFlushToZero = 1u << 15;
  static constexpr unsigned kAreZero = 1u << 6;
  unsigned before_;
#endif
};

}  // namespace lasem_fast
