// The table of loops that are compiled once for each vector width, and the choice among them.
#pragma once

#include <cstdint>

#include "cpu/isa_backward.h"

namespace dpk {

enum class Type : int { float32, bfloat16, float16 };
constexpr int kTypes = 3;

struct ChaChaInput {
  uint32_t key[8];
  uint32_t nonce[3];  // step (low, high), stream
};

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

  // sum of in[c]^2, c < count, in float64
  double (*sum_of_squares)(const float* in, int64_t count);

  // Of the sum over s, t < steps of (l_s . l_t)(r_s . r_t), the pairs whose smaller one lies in first ... first +
  // ghost_rows - 1; l_t = left[t * left_stride] of `width`, r_t = right[t * right_stride] of `depth` elements.
  double (*ghost_squares)(const float* left, int64_t left_stride, int64_t width, const float* right,
                          int64_t right_stride, int64_t depth, int64_t steps, int64_t first);
  int64_t ghost_rows;

  // total[c] += floor(double(in[c]) * factor + 0.5), c < count
  void (*add_rounded)(int64_t* total, const float* in, int64_t count, double factor);

  // out[8 * i + w] = 64-bit word w of block first_block + i, i < blocks
  void (*words)(uint64_t* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks);
  // out[8 * i + e] = standard normal e of block first_block + i, i < blocks, rounded up to 8
  void (*normals)(double* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks);

  // out[c] = (total[c] + floor(noise_std * z[c] + 0.5)) * scale, c < count; |noise_std * z[c]| < 2^51
  void (*add_noise)(float* out, const int64_t* total, const double* z, int64_t count, double noise_std, double scale);

  const BackwardKernels* backward;
};

// Widest set of loops that this processor runs; fixed for the life of the process.
const Kernels& kernels();

// A set by name ("baseline", "avx2"), or nullptr where this build or processor lacks it.
const Kernels* kernels_named(const char* name);

}  // namespace dpk
