#include "cpu_dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace lasem_fast {
namespace {

const Kernels kAvx512Kernels = {kLevelAvx512, kLinearAvx512, kNormAvx512};
const Kernels kAvx2Kernels = {kLevelAvx2, kLinearAvx2, kNormAvx2};
const Kernels kDoubleKernels = {kLevelDouble, kLinearDouble, kNormDouble};

struct Isa {
  const char* name;
  const Kernels* kernels;
  const char* reason;
};

const Isa kAvx512 = {"avx512", &kAvx512Kernels, ""};
const Isa kAvx2 = {"avx2", &kAvx2Kernels, ""};
const Isa kNone = {"", nullptr, "the CPU has neither AVX-512 (F, BW, DQ, VL) nor AVX2 with FMA"};
const Isa kBadChoice = {"", nullptr,
                        "LASEM_FAST_CPU_ISA names an instruction set that is neither avx2 nor "
                        "avx512, or that this CPU lacks"};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#if defined(LASEM_EMULATE_AVX512)
bool has_avx512() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa* find(const char* name) {
  if (std::strcmp(name, kAvx512.name) == 0 && has_avx512()) return &kAvx512;
  if (std::strcmp(name, kAvx2.name) == 0 && has_avx2()) return &kAvx2;
  return nullptr;
}

const Isa* choose() {
  const char* wanted = std::getenv("LASEM_FAST_CPU_ISA");
  if (wanted && *wanted) {
    const Isa* isa = find(wanted);
    return isa ? isa : &kBadChoice;
  }
  return has_avx512() ? &kAvx512 : has_avx2() ? &kAvx2 : &kNone;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{choose()};
  return isa;
}

}  // namespace

const char* isa_name() { return current().load()->name; }

const char* isa_reason() { return current().load()->reason; }

bool force_isa(const char* name) {
  const Isa* isa = *name ? find(name) : choose();
  if (isa) current().store(isa);
  return isa != nullptr;
}

const Kernels& kernels_for(torch::headeronly::ScalarType dtype) {
  if (dtype == torch::headeronly::ScalarType::Double) return kDoubleKernels;
  const Kernels* kernels = current().load()->kernels;
  STD_TORCH_CHECK(kernels, "no float32 CPU kernels: ", isa_reason());
  return *kernels;
}

}  // namespace lasem_fast
