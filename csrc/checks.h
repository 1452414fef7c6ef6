// Argument checks shared by the ops. A message names the op, the argument and what was given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>

#include "cpu/isa.h"

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

// A new dense tensor on the CPU: by the C interface, since stable::new_empty goes through the dispatcher and takes
// longer than a small op.
template <size_t dim>
Tensor empty_cpu(const int64_t (&sizes)[dim], ScalarType type) {
  int64_t strides[dim];
  int64_t stride = 1;
  for (size_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  const int32_t dtype = type == ScalarType::Float    ? aoti_torch_dtype_float32()
                        : type == ScalarType::Double ? aoti_torch_dtype_float64()
                                                     : aoti_torch_dtype_int64();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor, ScalarType type, int64_t dim) {
  check(tensor.is_cpu(), op, name, " must be on the CPU");
  check(tensor.scalar_type() == type, op, name, " must be ", dtype_name(type), ", not ",
        dtype_name(tensor.scalar_type()));
  check(tensor.dim() == dim, op, name, " must have ", dim, " dimensions, not ", tensor.dim());
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor, ScalarType type, int64_t dim) {
  check_cpu(op, name, tensor, type, dim);
  check(tensor.is_contiguous(), op, name, " must be contiguous");
}

// rows [B, P] float32: neighbouring columns, rows that do not overlap.
inline void check_rows(const char* op, const Tensor& rows) {
  check_cpu(op, "rows", rows, ScalarType::Float, 2);
  check(rows.size(1) <= 1 || rows.stride(1) == 1, op, "rows must have column stride 1, not ", rows.stride(1));
  check(rows.size(0) <= 1 || rows.stride(0) >= rows.size(1), op, "rows must not overlap: row stride ",
        rows.stride(0), " for ", rows.size(1), " columns");
}

// offsets [L + 1]: 0 = offsets[0] <= offsets[1] <= ... <= offsets[L] = columns.
inline void check_offsets(const char* op, const Tensor& offsets, int64_t columns) {
  check_contiguous(op, "offsets", offsets, ScalarType::Long, 1);
  check(offsets.numel() >= 2, op, "offsets must have at least two elements");
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const int64_t groups = offsets.numel() - 1;
  bool rising = at[0] == 0 && at[groups] == columns;
  for (int64_t l = 0; l < groups; ++l) rising = rising && at[l] <= at[l + 1];
  check(rising, op, "offsets must rise from 0 to the number of columns, ", columns);
}

// key [8] int32, step [1] int64 and the stream number, as the ChaCha20 state holds them.
inline ChaChaInput chacha_input(const char* op, const Tensor& key, const Tensor& step, int64_t stream) {
  check_contiguous(op, "key", key, ScalarType::Int, 1);
  check_contiguous(op, "step", step, ScalarType::Long, 1);
  check(key.numel() == 8, op, "key must have 8 elements, not ", key.numel());
  check(step.numel() == 1, op, "step must have 1 element, not ", step.numel());
  check(stream >= 0 && stream < (int64_t{1} << 32), op, "stream must be a 32-bit number, not ", stream);
  ChaChaInput input{};
  for (int i = 0; i < 8; ++i) input.key[i] = static_cast<uint32_t>(key.const_data_ptr<int32_t>()[i]);
  const auto number = static_cast<uint64_t>(step.const_data_ptr<int64_t>()[0]);
  input.nonce[0] = static_cast<uint32_t>(number);
  input.nonce[1] = static_cast<uint32_t>(number >> 32);
  input.nonce[2] = static_cast<uint32_t>(stream);
  return input;
}

// Words first ... first + count - 1 must lie below the end of the 32-bit block counter.
inline void check_range(const char* op, int64_t first, int64_t count) {
  constexpr int64_t end = int64_t{8} << 32;
  check(first >= 0 && count >= 0 && first <= end && count <= end - first, op, "first = ", first,
        " and count = ", count, " leave the 2^35 words of one key stream");
}

}  // namespace dpk
