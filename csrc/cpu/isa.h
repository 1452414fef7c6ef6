// The table of loops that are compiled once for each vector width, and the choice among them.
#pragma once

#include <cstdint>

#include "cpu/isa_backward.h"
#include "cpu/isa_release.h"

namespace dpk {

enum class Type : int { float32, bfloat16, float16 };
constexpr int kTypes = 3;

struct Kernels {
  const char* name;

  // out[c] = (or += when accumulate) sum over t < steps of in[t * stride + c], c < width < kMaxTile + 16
  void (*features_last[kTypes])(const void* in, int64_t steps, int64_t stride, int64_t width, float* out,
                                bool accumulate);
  // out[c] = (or +=) sum over t < steps of in[c * stride + t], c < width
  void (*channels_first[kTypes])(const void* in, int64_t steps, int64_t stride, int64_t width, float* out,
                                 bool accumulate);
  // out[c] = (or +=) sum over t < steps of in[t * stride_steps + c * stride_features], c < width
  void (*strided[kTypes])(const void* in, int64_t steps, int64_t stride_steps, int64_t stride_features, int64_t width,
                          float* out, bool accumulate);

  const BackwardKernels* backward;
  const ReleaseKernels* release;
};

// Widest set of loops that this processor runs; fixed for the life of the process.
const Kernels& kernels();

// A set by name ("baseline", "avx2", "avx512"), or nullptr where this build or processor lacks it.
const Kernels* kernels_named(const char* name);

}  // namespace dpk
