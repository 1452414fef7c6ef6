// What a backward keeps of an activation: bits, bit planes, derivatives of 24 bits.
#include "cuda/launch.cuh"
#include "cuda/packed_kernel.cuh"
#include "checks_backward.h"
#include "ops.h"

namespace dpk {

namespace {

int type_number(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}

cuda::PackArguments pack_arguments(const Tensor& x, const Tensor& out) {
  cuda::PackArguments a{};
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr<uint8_t>();
  a.count = x.numel();
  return a;
}

// `each` elements a thread.
void launch(const char* op, const Tensor& x, cuda::PackKernel kernel, int each, const cuda::PackArguments& a) {
  if (a.count == 0) return;
  const cuda::OnDeviceOf device(x);
  cuda::launch(op, kernel, cuda::blocks_of(a.count, each), cuda::kPackThreads, device, a);
}

// y may be x.
Tensor clamp(const char* op, const Tensor& x, const Tensor& y, double low, double high, double slope) {
  const Tensor bits = empty_beside(x, {bytes_of_bits(x.numel())}, ScalarType::Byte);
  cuda::PackArguments a = pack_arguments(x, bits);
  a.y = y.mutable_data_ptr();
  a.low = static_cast<float>(low);
  a.high = static_cast<float>(high);
  a.slope = static_cast<float>(slope);
  launch(op, x, cuda::clamp_pack_kernel_for(a, type_number(x)), 8, a);
  return bits;
}

}  // namespace

Tensor pack_bits(const Tensor& mask) {
  constexpr const char* op = "pack_bits";
  check(mask.scalar_type() == ScalarType::Bool, op, "mask must be bool, not ", dtype_name(mask.scalar_type()));
  check(mask.is_contiguous(), op, "mask must be contiguous");
  const Tensor bits = empty_beside(mask, {bytes_of_bits(mask.numel())}, ScalarType::Byte);
  const cuda::PackArguments a = pack_arguments(mask, bits);
  launch(op, mask, cuda::pack_bits_kernel_for(a), 8, a);
  return bits;
}

std::tuple<Tensor, Tensor> clamp_pack(const Tensor& x, double low, double high, double slope) {
  check_float("clamp_pack", "x", x);
  const Tensor y = empty_as(x);
  return {y, clamp("clamp_pack", x, y, low, high, slope)};
}

Tensor clamp_pack_(const Tensor& x, double low, double high, double slope) {
  check_float("clamp_pack_", "x", x);
  return clamp("clamp_pack_", x, x, low, high, slope);
}

Tensor level_pack(const Tensor& x, const Tensor& edges) {
  check_float("level_pack", "x", x);
  check_vector("level_pack", "edges", edges, x, ScalarType::Float, 7);
  const Tensor planes = empty_beside(x, {3, bytes_of_bits(x.numel())}, ScalarType::Byte);
  cuda::PackArguments a = pack_arguments(x, planes);
  a.edges = edges.const_data_ptr<float>();
  launch("level_pack", x, cuda::level_pack_kernel_for(a, type_number(x)), 8, a);
  return planes;
}

std::tuple<Tensor, Tensor> slope_pack(const Tensor& x, int64_t kind) {
  constexpr const char* op = "slope_pack";
  check(x.scalar_type() == ScalarType::Float, op, "x must be float32, not ", dtype_name(x.scalar_type()));
  check(x.is_contiguous(), op, "x must be contiguous");
  check_kind(op, kind);
  const Tensor y = empty_as(x), codes = empty_beside(x, {3, x.numel()}, ScalarType::Byte);
  cuda::PackArguments a = pack_arguments(x, codes);
  a.y = y.mutable_data_ptr();
  a.kind = static_cast<int>(kind);
  launch(op, x, cuda::slope_pack_kernel_for(a), cuda::slope_pack_each(a), a);
  return {y, codes};
}

}  // namespace dpk
