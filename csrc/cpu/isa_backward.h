// The loops of the ops that keep little for backward, compiled once for each vector width as those of isa.h.
#pragma once

#include <cstdint>

namespace dpk {

constexpr int kActivations = 4;  // gelu, gelu_tanh, silu, quick_gelu
constexpr int kInputs = 2;       // what a norm kept: the type of the gradient, or int8

// Of clamp_pack; a NaN as high never compares.
struct ClampLimits {
  float low, high, slope;
};

// What a norm kept of one row or group: n = (x - shift) * scale.
struct NormRow {
  float shift, scale, rstd;
};

// grad, x, result and what is packed may lie at any address. Arrays over element types are in the order of Type.
struct BackwardKernels {
  // bits [ceil(count / 8)] of mask [count], any byte but 0 is true
  void (*pack_bits)(const void* mask, int64_t count, uint8_t* bits);
  // y may be x
  void (*clamp_pack[3])(const void* x, int64_t count, const ClampLimits& limits, void* y, uint8_t* bits);
  // Element i belongs to bit first + i.
  void (*bit_scale[3])(const void* x, const uint8_t* bits, int64_t first, int64_t count, float on, float off, void* y);
  void (*activation_grad[kActivations][3])(const void* grad, const void* x, int64_t count, void* dx);
  // code byte k of element i goes to codes[k * stride + i]
  void (*slope_pack[kActivations])(const float* x, int64_t count, float* y, uint8_t* codes, int64_t stride);
  void (*slope_scale)(const float* grad, const uint8_t* codes, int64_t stride, int64_t count, float* dx);
  // plane k starts at planes + k * stride bytes
  void (*level_pack[3])(const void* x, const float* edges, int64_t count, uint8_t* planes, int64_t stride);
  // Element i belongs to bit first + i of each plane.
  void (*level_scale[3])(const void* grad, const uint8_t* planes, int64_t stride, int64_t first, int64_t count,
                         const float* levels, void* dx);
  // One row of x; returns its scale.
  float (*quantize_row[3])(const void* x, int64_t count, float mean, float rstd, int8_t* codes);
  // dx of one row, weight [count] or null
  void (*layer_norm_row[3][kInputs])(const void* grad, const void* x, int64_t count, const NormRow& norm,
                                     const float* weight, void* dx);
  // dx of the group of `channels` rows of `steps` neighbours; weight [channels] or null; sums [channels] of grad
  void (*group_norm_group[3][kInputs])(const void* grad, const void* x, int64_t channels, int64_t steps,
                                       const NormRow& norm, const float* weight, float* sums, void* dx);
  // out [count] = grad * (x - mean) / sqrt(var + eps), of one row; the mean is 0 where not centered
  void (*normed_product[3])(const void* grad, const void* x, int64_t count, double eps, bool centered, float* out);
  // dx[i] = grad[i] * scale[i], one row
  void (*scale_by[3])(const void* grad, const float* scale, int64_t count, void* dx);
  // dx[i] = grad[i] * factor
  void (*scale_all[3])(const void* grad, float factor, int64_t count, void* dx);
  // sums (= when first, else +=) the rows of a block [rows, width], rows <= 128. 16 columns a slot; those of the last
  // slot end at width, so that it may repeat columns of the slot before.
  void (*add_rows[3])(const void* block, int64_t rows, int64_t width, float* sums, bool first);
};

}  // namespace dpk
