// Argument checks shared by the ops. A message names the op, the argument and what was given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace dpk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A refused argument arrives in Python as a RuntimeError with this message.
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "dp_bitfit_kernels." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline int32_t dtype_number(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Char: return aoti_torch_dtype_int8();
    default: return aoti_torch_dtype_int64();
  }
}

// A new tensor on the device of `like`: by the C interface, since stable::new_empty goes through the dispatcher and
// takes longer than a small op.
inline Tensor empty_strided_beside(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                   ScalarType type) {
  const bool cpu = like.is_cpu();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, dtype_number(type), cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
      cpu ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}

// A dense one.
template <size_t dim>
Tensor empty_beside(const Tensor& like, const int64_t (&sizes)[dim], ScalarType type) {
  int64_t strides[dim];
  int64_t stride = 1;
  for (size_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return empty_strided_beside(like, dim, sizes, strides, type);
}

inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type, int64_t dim) {
  check(tensor.scalar_type() == type, op, name, " must be ", dtype_name(type), ", not ",
        dtype_name(tensor.scalar_type()));
  check(tensor.dim() == dim, op, name, " must have ", dim, " dimensions, not ", tensor.dim());
}

// The dispatcher chose the op by one argument's device: the others must be there, too.
inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
            (like.is_cpu() || tensor.get_device_index() == like.get_device_index()),
        op, name, " is on another device than the other arguments: move it there");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                             ScalarType type, int64_t dim) {
  check_device(op, name, tensor, like);
  check_tensor(op, name, tensor, type, dim);
  check(tensor.is_contiguous(), op, name, " must be contiguous");
}

// rows [B, P] float32: neighbouring columns, rows that do not overlap.
inline void check_rows(const char* op, const Tensor& rows) {
  check_tensor(op, "rows", rows, ScalarType::Float, 2);
  check(rows.size(1) <= 1 || rows.stride(1) == 1, op, "rows must have column stride 1, not ", rows.stride(1));
  check(rows.size(0) <= 1 || rows.stride(0) >= rows.size(1), op, "rows must not overlap: row stride ",
        rows.stride(0), " for ", rows.size(1), " columns");
}

// grad [B, T, p] of a type that the kernels load.
inline void check_grad(const char* op, const Tensor& grad) {
  check(grad.dim() == 3, op, "grad must be [B, T, p], not of ", grad.dim(), " dimensions");
  const ScalarType type = grad.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
        "grad must be float32, bfloat16 or float16, not ", dtype_name(type));
}

// rows [B, p] beside grad [B, T, p].
inline void check_rows_of(const char* op, const Tensor& rows, const Tensor& grad) {
  check_device(op, "rows", rows, grad);
  check_rows(op, rows);
  check(rows.size(0) == grad.size(0) && rows.size(1) == grad.size(2), op, "rows [", rows.size(0), ", ", rows.size(1),
        "] do not fit grad [", grad.size(0), ", ", grad.size(1), ", ", grad.size(2), "]");
}

// The arguments of clip_factors; returns the number of groups.
inline int64_t check_clip(const Tensor& rows, const Tensor& offsets, const Tensor& mask, const Tensor& bounds,
                          const Tensor& grid, const std::optional<Tensor>& extra_squares, double scale,
                          const std::optional<double>& gamma) {
  constexpr const char* op = "clip_factors";
  check_rows(op, rows);
  check(std::isfinite(scale) && scale > 0.0, op, "scale must be finite and positive, not ", scale);
  check(!gamma || (std::isfinite(*gamma) && *gamma > 0.0), op, "gamma must be finite and positive, not ",
        gamma.value_or(0.0));
  const int64_t batch = rows.size(0);
  check_contiguous(op, "offsets", offsets, rows, ScalarType::Long, 1);
  check(offsets.numel() >= 2, op, "offsets must have at least two elements");
  const int64_t groups = offsets.numel() - 1;
  check_contiguous(op, "mask", mask, rows, ScalarType::Bool, 1);
  check_contiguous(op, "bounds", bounds, rows, ScalarType::Double, 1);
  check_contiguous(op, "grid", grid, rows, ScalarType::Double, 1);
  check(mask.numel() == batch, op, "mask must have one element a row, ", batch, ", not ", mask.numel());
  check(bounds.numel() == groups && grid.numel() == groups, op, "bounds and grid must have one element a group, ",
        groups, ", not ", bounds.numel(), " and ", grid.numel());
  if (extra_squares) {
    check_contiguous(op, "extra_squares", *extra_squares, rows, ScalarType::Double, 2);
    check(extra_squares->size(0) == batch && extra_squares->size(1) == groups, op, "extra_squares must be [", batch,
          ", ", groups, "]");
  }
  return groups;
}

// The arguments of clipped_sum_; returns the number of groups.
inline int64_t check_sum(const Tensor& total, const Tensor& rows, const Tensor& offsets, const Tensor& factors) {
  constexpr const char* op = "clipped_sum_";
  check_rows(op, rows);
  check_contiguous(op, "offsets", offsets, rows, ScalarType::Long, 1);
  check(offsets.numel() >= 2, op, "offsets must have at least two elements");
  const int64_t batch = rows.size(0), columns = rows.size(1), groups = offsets.numel() - 1;
  check_contiguous(op, "total", total, rows, ScalarType::Long, 1);
  check_contiguous(op, "factors", factors, rows, ScalarType::Double, 2);
  check(total.numel() == columns, op, "total must have one element a column, ", columns, ", not ", total.numel());
  check(factors.size(0) == batch && factors.size(1) == groups, op, "factors must be [", batch, ", ", groups, "]");
  return groups;
}

// key [8] int32, step [1] int64 and the stream number.
inline void check_stream(const char* op, const Tensor& key, const Tensor& step, int64_t stream) {
  check_contiguous(op, "key", key, key, ScalarType::Int, 1);
  check_contiguous(op, "step", step, key, ScalarType::Long, 1);
  check(key.numel() == 8, op, "key must have 8 elements, not ", key.numel());
  check(step.numel() == 1, op, "step must have 1 element, not ", step.numel());
  check(stream >= 0 && stream < (int64_t{1} << 32), op, "stream must be a 32-bit number, not ", stream);
}

// Words first ... first + count - 1 must lie below the end of the 32-bit block counter.
inline void check_range(const char* op, int64_t first, int64_t count) {
  constexpr int64_t end = int64_t{8} << 32;
  check(first >= 0 && count >= 0 && first <= end && count <= end - first, op, "first = ", first,
        " and count = ", count, " leave the 2^35 words of one key stream");
}

// The arguments of noisy_sum and noisy_sum_; release of the latter, or null.
inline void check_noisy_sum(const char* op, const Tensor* release, const Tensor& total, const Tensor& key,
                            const Tensor& step, int64_t stream, int64_t first, double noise_std) {
  check_stream(op, key, step, stream);
  check_contiguous(op, "total", total, key, ScalarType::Long, 1);
  check_range(op, first, total.numel());
  // Above this a float64 no longer holds noise_std * z + 0.5 to a small part of one grid cell.
  check(noise_std >= 0.0 && noise_std <= 0x1p40, op, "noise_std must lie in [0, 2^40], not ", noise_std);
  if (release == nullptr) return;
  check_contiguous(op, "release", *release, key, ScalarType::Float, 1);
  check(release->numel() == total.numel(), op, "release must have one element for each of total, ", total.numel(),
        ", not ", release->numel());
}

}  // namespace dpk
