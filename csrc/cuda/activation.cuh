// Activations and their derivatives, float32. kind: 0 gelu, 1 gelu_tanh, 2 silu, 3 quick_gelu.
#pragma once

#include <cmath>

#include "cuda/device.cuh"

namespace dpk {
namespace cuda {

// sigmoid(a) and sigmoid(-a), each with its own relative precision: 1 - sigmoid(a) would have none near 0.
struct Sigmoids {
  float up, down;
};

__device__ inline Sigmoids sigmoids(float a) {
  const float small = expf(-fabsf(a));
  const float near_1 = 1.0f / (1.0f + small), near_0 = small * near_1;
  return a >= 0.0f ? Sigmoids{near_1, near_0} : Sigmoids{near_0, near_1};
}

// Of all but gelu: f(x) = x sigmoid(a(x)); tanh(u) is 2 sigmoid(2 u) - 1.
struct Inner {
  float value, slope;  // a(x), a'(x)
};

__device__ inline Inner inner(float x, int kind) {
  if (kind == 1) {
    constexpr float two_sqrt_2_pi = 1.5957691216057308f, cube = 0.044715f;
    const float square = x * x;
    return {two_sqrt_2_pi * (x + cube * square * x), two_sqrt_2_pi * (1.0f + 3.0f * cube * square)};
  }
  const float factor = kind == 3 ? 1.702f : 1.0f;
  return {factor * x, factor};
}

__device__ inline float normal_cdf(float x) { return 0.5f * (1.0f + erff(x * 0.7071067811865476f)); }

__device__ inline float activation(float x, int kind) {
  if (kind == 0) return x * normal_cdf(x);
  return x * sigmoids(inner(x, kind).value).up;
}

__device__ inline float derivative(float x, int kind) {
  if (kind == 0) return normal_cdf(x) + x * (expf(-0.5f * x * x) * 0.3989422804014327f);
  const Inner a = inner(x, kind);
  const Sigmoids s = sigmoids(a.value);
  return s.up * (1.0f + x * a.slope * s.down);
}

constexpr float kSlopeSteps = 8388608.0f;  // 2^23 codes for each unit of a derivative, from -0.5 on

// floor((d + 0.5) 2^23 + 0.5), 0 for NaN. d 2^23 is exact in float32; it is rounded by its fraction, since adding 0.5
// to an integer beyond 2^23 would round once more.
__device__ inline uint32_t slope_code(float d) {
  if (!(d >= -0.5f)) return 0;
  const float steps = d * kSlopeSteps, whole = floorf(steps);
  const int code = static_cast<int>(whole) + (steps - whole >= 0.5f ? 1 : 0) + (1 << 22);
  return static_cast<uint32_t>(code < (1 << 24) ? code : (1 << 24) - 1);
}

}  // namespace cuda
}  // namespace dpk
