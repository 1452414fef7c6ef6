// What the CPU ops read from their arguments before they start; on a GPU such a look would wait for the device.
#pragma once

#include <initializer_list>

#include "checks.h"
#include "cpu/isa.h"

namespace dpk {

// offsets [L + 1]: 0 = offsets[0] <= offsets[1] <= ... <= offsets[L] = columns.
inline void check_offsets(const char* op, const Tensor& offsets, int64_t columns) {
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const int64_t groups = offsets.numel() - 1;
  bool rising = at[0] == 0 && at[groups] == columns;
  for (int64_t l = 0; l < groups; ++l) rising = rising && at[l] <= at[l + 1];
  check(rising, op, "offsets must rise from 0 to the number of columns, ", columns);
}

// left [B, T, p] and right [B, T, d] of outer products.
inline void check_factors(const char* op, const Tensor& left, const Tensor& right) {
  check_tensor(op, "left", left, ScalarType::Float, 3);
  check_tensor(op, "right", right, ScalarType::Float, 3);
  check_device(op, "right", right, left);
  check(right.size(0) == left.size(0) && right.size(1) == left.size(1), op, "right [", right.size(0), ", ",
        right.size(1), ", ...] does not fit left [", left.size(0), ", ", left.size(1), ", ...]");
  for (const Tensor* one : {&left, &right}) {
    check(one->numel() == 0 || one->size(2) == 1 || one->stride(2) == 1 || one->size(1) == 1 || one->stride(1) == 1, op,
          "terms of left and of right, or elements of a term, must lie side by side");
  }
}

// Those of sample i. Strides of dimensions of one element say nothing.
inline Terms terms_of(const Tensor& x, int64_t i) {
  const float* at = x.const_data_ptr<float>() + i * x.stride(0);
  if (x.size(2) == 1 || x.stride(2) == 1) return {at, x.stride(1), 1};
  return {at, 1, x.stride(2)};
}

// As the ChaCha20 state holds them.
inline ChaChaInput chacha_input(const Tensor& key, const Tensor& step, int64_t stream) {
  ChaChaInput input{};
  for (int i = 0; i < 8; ++i) input.key[i] = static_cast<uint32_t>(key.const_data_ptr<int32_t>()[i]);
  const auto number = static_cast<uint64_t>(step.const_data_ptr<int64_t>()[0]);
  input.nonce[0] = static_cast<uint32_t>(number);
  input.nonce[1] = static_cast<uint32_t>(number >> 32);
  input.nonce[2] = static_cast<uint32_t>(stream);
  return input;
}

}  // namespace dpk
