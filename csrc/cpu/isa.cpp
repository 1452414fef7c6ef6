#include "cpu/isa.h"

#include <cstring>

namespace dpk {

namespace baseline {
extern const Kernels table;
}
#ifdef DPK_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif

const Kernels* kernels_named(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &baseline::table;
#ifdef DPK_HAVE_AVX2
  // Every processor with AVX2 has F16C.
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return &avx2::table;
  }
#endif
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const Kernels* widest = kernels_named("avx2");
    return widest != nullptr ? *widest : baseline::table;
  }();
  return chosen;
}

}  // namespace dpk
