// Activations in backward: by x, or by the codes of their derivatives that forward left.
#include "cpu/visit.h"
#include "ops.h"

namespace dpk {

std::tuple<Tensor, Tensor> activation_grad(const Tensor& grad, const Tensor& x, int64_t kind, int64_t reduce) {
  constexpr const char* op = "activation_grad";
  check_reduced(op, grad, reduce);
  check_same_shape(op, x, grad);
  check(x.scalar_type() == grad.scalar_type(), op, "x must be ", dtype_name(grad.scalar_type()), " as grad, not ",
        dtype_name(x.scalar_type()));
  check_kind(op, kind);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const int64_t bytes = item_bytes(grad);
  const auto loop = kernels().backward->activation_grad[kind][type_number(grad)];
  visit_and_sum(grad, dx, rows, reduce, [&](int64_t first, int64_t count) {
    loop(element(grad, bytes, first), element(x, bytes, first), count, mutable_element(dx, bytes, first));
  });
  return {dx, rows};
}

std::tuple<Tensor, Tensor> slope_pack(const Tensor& x, int64_t kind) {
  constexpr const char* op = "slope_pack";
  check(x.scalar_type() == ScalarType::Float, op, "x must be float32, not ", dtype_name(x.scalar_type()));
  check(x.is_contiguous(), op, "x must be contiguous");
  check_kind(op, kind);
  const int64_t n = x.numel();
  const Tensor y = empty_as(x), codes = empty_beside(x, {3, n}, ScalarType::Byte);
  const auto loop = kernels().backward->slope_pack[kind];
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  uint8_t* packed = codes.mutable_data_ptr<uint8_t>();
  visit_elements(n, 4, [&](int64_t first, int64_t count) { loop(in + first, count, out + first, packed + first, n); });
  return {y, codes};
}

std::tuple<Tensor, Tensor> slope_scale(const Tensor& grad, const Tensor& codes, int64_t reduce) {
  constexpr const char* op = "slope_scale";
  check_reduced(op, grad, reduce);
  check(grad.scalar_type() == ScalarType::Float, op, "grad must be float32, not ", dtype_name(grad.scalar_type()));
  const int64_t n = grad.numel();
  check_matrix(op, "codes", codes, grad, ScalarType::Byte, 3, n);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const auto loop = kernels().backward->slope_scale;
  const float* in = grad.const_data_ptr<float>();
  const uint8_t* packed = codes.const_data_ptr<uint8_t>();
  float* out = dx.mutable_data_ptr<float>();
  visit_and_sum(grad, dx, rows, reduce,
                [&](int64_t first, int64_t count) { loop(in + first, packed + first, n, count, out + first); });
  return {dx, rows};
}

}  // namespace dpk
