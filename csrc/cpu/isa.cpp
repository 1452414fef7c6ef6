#include "cpu/isa.h"

#include <cstring>
#include <initializer_list>

namespace dpk {

namespace baseline {
extern const Kernels table;
}
#ifdef DPK_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef DPK_HAVE_AVX512
namespace avx512 {
extern const ReleaseKernels release_table;
}

namespace {

// Loops that wait for memory gain nothing from wider registers: AVX2's serve.
Kernels with_avx512() {
  Kernels kernels = avx2::table;
  kernels.name = "avx512", kernels.release = &avx512::release_table;
  return kernels;
}

}  // namespace
#endif

const Kernels* kernels_named(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &baseline::table;
#ifdef DPK_HAVE_AVX2
  // Every processor with AVX2 has F16C.
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return &avx2::table;
  }
#endif
#ifdef DPK_HAVE_AVX512
  if (std::strcmp(name, "avx512") == 0 && kernels_named("avx2") != nullptr && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    static const Kernels table = with_avx512();
    return &table;
  }
#endif
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    for (const char* name : {"avx512", "avx2"}) {
      const Kernels* found = kernels_named(name);
      if (found != nullptr) return *found;
    }
    return baseline::table;
  }();
  return chosen;
}

}  // namespace dpk
