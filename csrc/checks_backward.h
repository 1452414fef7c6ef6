// Argument checks of the ops that keep little for backward, and the tensors that they return.
#pragma once

#include "checks.h"

namespace dpk {

inline void check_float(const char* op, const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, name,
        " must be float32, bfloat16 or float16, not ", dtype_name(type));
  check(x.is_contiguous(), op, name, " must be contiguous");
}

// grad [B, R, C]; reduce is 0 (nothing is summed), 1 (over R) or 2 (over C).
inline void check_reduced(const char* op, const Tensor& grad, int64_t reduce) {
  check_float(op, "grad", grad);
  check(grad.dim() == 3, op, "grad must be [B, R, C], not of ", grad.dim(), " dimensions");
  check(reduce >= 0 && reduce <= 2, op, "reduce must be 0, 1 or 2, not ", reduce);
}

inline void check_kind(const char* op, int64_t kind) {
  check(kind >= 0 && kind < 4, op, "kind must be 0 to 3, not ", kind);
}

// A float32 or uint8 companion [count].
inline void check_vector(const char* op, const char* name, const Tensor& tensor, const Tensor& like, ScalarType type,
                         int64_t count) {
  check_contiguous(op, name, tensor, like, type, 1);
  check(tensor.numel() == count, op, name, " must have ", count, " elements, not ", tensor.numel());
}

inline void check_matrix(const char* op, const char* name, const Tensor& tensor, const Tensor& like, ScalarType type,
                         int64_t rows, int64_t columns) {
  check_contiguous(op, name, tensor, like, type, 2);
  check(tensor.size(0) == rows && tensor.size(1) == columns, op, name, " must be [", rows, ", ", columns, "], not [",
        tensor.size(0), ", ", tensor.size(1), "]");
}

inline void check_same_shape(const char* op, const Tensor& x, const Tensor& grad) {
  check_device(op, "x", x, grad);
  check(x.is_contiguous(), op, "x must be contiguous");
  bool same = x.dim() == grad.dim();
  for (int64_t i = 0; same && i < grad.dim(); ++i) same = x.size(i) == grad.size(i);
  check(same, op, "x must have the shape of grad");
}

// What a norm kept: x of grad's type or int8.
inline void check_kept(const char* op, const Tensor& x, const Tensor& grad) {
  check_same_shape(op, x, grad);
  check(x.scalar_type() == grad.scalar_type() || x.scalar_type() == ScalarType::Char, op, "x must be ",
        dtype_name(grad.scalar_type()), " as grad, or int8, not ", dtype_name(x.scalar_type()));
}

inline void check_layer_norm(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                             const Tensor& scale, const Tensor& rstd, const std::optional<Tensor>& weight,
                             int64_t reduce) {
  constexpr const char* op = "layer_norm_grad";
  check_reduced(op, grad, reduce);
  check(reduce != 2, op, "reduce must be 0 or 1, not 2: the sum over C is not taken");
  check_kept(op, x, grad);
  const int64_t count = grad.size(0) * grad.size(1);
  if (shift) check_vector(op, "shift", *shift, grad, ScalarType::Float, count);
  check_vector(op, "scale", scale, grad, ScalarType::Float, count);
  check_vector(op, "rstd", rstd, grad, ScalarType::Float, count);
  if (weight) check_vector(op, "weight", *weight, grad, ScalarType::Float, grad.size(2));
}

// Returns the number of groups.
inline int64_t check_group_norm(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                const Tensor& scale, const Tensor& rstd, const std::optional<Tensor>& weight) {
  constexpr const char* op = "group_norm_grad";
  check_reduced(op, grad, 2);
  check_kept(op, x, grad);
  check(scale.dim() == 2, op, "scale must be [B, G], not of ", scale.dim(), " dimensions");
  const int64_t batch = grad.size(0), channels = grad.size(1), groups = scale.size(1);
  check(groups > 0 && channels % groups == 0, op, channels, " channels cannot form ", groups, " groups");
  if (shift) check_matrix(op, "shift", *shift, grad, ScalarType::Float, batch, groups);
  check_matrix(op, "scale", scale, grad, ScalarType::Float, batch, groups);
  check_matrix(op, "rstd", rstd, grad, ScalarType::Float, batch, groups);
  if (weight) check_vector(op, "weight", *weight, grad, ScalarType::Float, channels);
  return groups;
}

inline int64_t bytes_of_bits(int64_t count) { return (count + 7) / 8; }

// Of the shape, type and (contiguous) strides of x.
inline Tensor empty_as(const Tensor& x) {
  return empty_strided_beside(x, x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
}

// rows beside grad [B, R, C]: [0], [B, C] or [B, R].
inline Tensor empty_rows(const Tensor& grad, int64_t reduce) {
  if (reduce == 0) return empty_beside(grad, {0}, ScalarType::Float);
  return empty_beside(grad, {grad.size(0), grad.size(3 - reduce)}, ScalarType::Float);
}

}  // namespace dpk
