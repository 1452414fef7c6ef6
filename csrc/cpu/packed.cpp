// Bits and bit planes that stand for an activation in backward, and what they scale.
#include "cpu/visit.h"
#include "ops.h"

namespace dpk {

Tensor pack_bits(const Tensor& mask) {
  constexpr const char* op = "pack_bits";
  check(mask.scalar_type() == ScalarType::Bool, op, "mask must be bool, not ", dtype_name(mask.scalar_type()));
  check(mask.is_contiguous(), op, "mask must be contiguous");
  const Tensor bits = empty_beside(mask, {bytes_of_bits(mask.numel())}, ScalarType::Byte);
  uint8_t* out = bits.mutable_data_ptr<uint8_t>();
  visit_elements(mask.numel(), 1, [&](int64_t first, int64_t count) {
    kernels().backward->pack_bits(element(mask, 1, first), count, out + first / 8);
  });
  return bits;
}

namespace {

// y may be x.
Tensor clamp(const Tensor& x, const Tensor& y, double low, double high, double slope) {
  const Tensor bits = empty_beside(x, {bytes_of_bits(x.numel())}, ScalarType::Byte);
  const int64_t bytes = item_bytes(x);
  const auto loop = kernels().backward->clamp_pack[type_number(x)];
  const ClampLimits limits{float(low), float(high), float(slope)};
  uint8_t* out = bits.mutable_data_ptr<uint8_t>();
  visit_elements(x.numel(), bytes, [&](int64_t first, int64_t count) {
    loop(element(x, bytes, first), count, limits, mutable_element(y, bytes, first), out + first / 8);
  });
  return bits;
}

}  // namespace

std::tuple<Tensor, Tensor> clamp_pack(const Tensor& x, double low, double high, double slope) {
  check_float("clamp_pack", "x", x);
  const Tensor y = empty_as(x);
  return {y, clamp(x, y, low, high, slope)};
}

Tensor clamp_pack_(const Tensor& x, double low, double high, double slope) {
  check_float("clamp_pack_", "x", x);
  return clamp(x, x, low, high, slope);
}

std::tuple<Tensor, Tensor> bit_scale(const Tensor& x, const Tensor& bits, double on, double off, int64_t reduce) {
  constexpr const char* op = "bit_scale";
  check_reduced(op, x, reduce);
  check_vector(op, "bits", bits, x, ScalarType::Byte, bytes_of_bits(x.numel()));
  const Tensor y = empty_as(x), rows = empty_rows(x, reduce);
  const int64_t bytes = item_bytes(x);
  const auto loop = kernels().backward->bit_scale[type_number(x)];
  const uint8_t* in = bits.const_data_ptr<uint8_t>();
  visit_and_sum(x, y, rows, reduce, [&](int64_t first, int64_t count) {
    loop(element(x, bytes, first), in, first, count, float(on), float(off), mutable_element(y, bytes, first));
  });
  return {y, rows};
}

Tensor level_pack(const Tensor& x, const Tensor& edges) {
  constexpr const char* op = "level_pack";
  check_float(op, "x", x);
  check_vector(op, "edges", edges, x, ScalarType::Float, 7);
  const int64_t bytes = item_bytes(x), stride = bytes_of_bits(x.numel());
  const Tensor planes = empty_beside(x, {3, stride}, ScalarType::Byte);
  const auto loop = kernels().backward->level_pack[type_number(x)];
  const float* limits = edges.const_data_ptr<float>();
  uint8_t* out = planes.mutable_data_ptr<uint8_t>();
  visit_elements(x.numel(), bytes, [&](int64_t first, int64_t count) {
    loop(element(x, bytes, first), limits, count, out + first / 8, stride);
  });
  return planes;
}

std::tuple<Tensor, Tensor> level_scale(const Tensor& grad, const Tensor& planes, const Tensor& levels,
                                       int64_t reduce) {
  constexpr const char* op = "level_scale";
  check_reduced(op, grad, reduce);
  const int64_t bytes = item_bytes(grad), stride = bytes_of_bits(grad.numel());
  check_matrix(op, "planes", planes, grad, ScalarType::Byte, 3, stride);
  check_vector(op, "levels", levels, grad, ScalarType::Float, 8);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const auto loop = kernels().backward->level_scale[type_number(grad)];
  const uint8_t* in = planes.const_data_ptr<uint8_t>();
  const float* values = levels.const_data_ptr<float>();
  visit_and_sum(grad, dx, rows, reduce, [&](int64_t first, int64_t count) {
    loop(element(grad, bytes, first), in, stride, first, count, values, mutable_element(dx, bytes, first));
  });
  return {dx, rows};
}

}  // namespace dpk
