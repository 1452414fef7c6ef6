// A gradient times what was kept of the forward pass, and its per-sample sum: one visit to both.
#include "cuda/launch.cuh"
#include "cuda/scale_kernel.cuh"
#include "checks_backward.h"
#include "ops.h"

namespace dpk {

namespace {

int type_number(ScalarType type) { return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2; }

uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// `kept` is aligned as grad must be, once `kept_bytes` of it (0: any address will do) are scaled to grad's.
template <class Factor>
std::tuple<Tensor, Tensor> scale(const char* op, const Tensor& grad, int64_t reduce, cuda::ScaleArguments given,
                                 int64_t kept_bytes) {
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const cuda::OnDeviceOf device(grad);
  if (grad.numel() == 0) {
    if (rows.numel() > 0) torch::stable::zero_(const_cast<Tensor&>(rows));
    return {dx, rows};
  }
  const int64_t bytes = grad.scalar_type() == ScalarType::Float ? 4 : 2;
  uint64_t all = address(grad.const_data_ptr()) | address(dx.const_data_ptr());
  if (kept_bytes > 0) all |= address(given.kept) * static_cast<uint64_t>(bytes / kept_bytes);
  cuda::ScaleLaunch made =
      cuda::plan_scale(grad.size(0), grad.size(1), grad.size(2), static_cast<int>(reduce), bytes, all);
  const bool two_stages = reduce != 0 && made.splits > 1;
  const Tensor out =
      two_stages ? empty_beside(grad, {made.batch, made.splits, made.features}, ScalarType::Float) : rows;
  cuda::ScaleArguments& a = made.arguments;
  a.sums.grad = grad.const_data_ptr();
  a.sums.out = out.mutable_data_ptr<float>();
  a.dx = dx.mutable_data_ptr();
  a.kept = given.kept;
  a.table = given.table;
  a.on = given.on;
  a.off = given.off;
  a.kind = given.kind;
  cuda::launch(op, cuda::scale_kernel<Factor>(type_number(grad.scalar_type()), made.layout, made.packet), made.blocks,
               cuda::kReduceThreads, device, a);
  return {dx, two_stages ? bias_grad(out) : rows};
}

}  // namespace

std::tuple<Tensor, Tensor> bit_scale(const Tensor& x, const Tensor& bits, double on, double off, int64_t reduce) {
  check_reduced("bit_scale", x, reduce);
  check_vector("bit_scale", "bits", bits, x, ScalarType::Byte, bytes_of_bits(x.numel()));
  cuda::ScaleArguments a{};
  a.kept = bits.const_data_ptr();
  a.on = static_cast<float>(on);
  a.off = static_cast<float>(off);
  return scale<cuda::Bits>("bit_scale", x, reduce, a, 0);
}

std::tuple<Tensor, Tensor> activation_grad(const Tensor& grad, const Tensor& x, int64_t kind, int64_t reduce) {
  constexpr const char* op = "activation_grad";
  check_reduced(op, grad, reduce);
  check_same_shape(op, x, grad);
  check(x.scalar_type() == grad.scalar_type(), op, "x must be ", dtype_name(grad.scalar_type()), " as grad, not ",
        dtype_name(x.scalar_type()));
  check_kind(op, kind);
  cuda::ScaleArguments a{};
  a.kept = x.const_data_ptr();
  a.kind = static_cast<int>(kind);
  return scale<cuda::Activation>(op, grad, reduce, a, grad.scalar_type() == ScalarType::Float ? 4 : 2);
}

std::tuple<Tensor, Tensor> slope_scale(const Tensor& grad, const Tensor& codes, int64_t reduce) {
  constexpr const char* op = "slope_scale";
  check_reduced(op, grad, reduce);
  check(grad.scalar_type() == ScalarType::Float, op, "grad must be float32, not ", dtype_name(grad.scalar_type()));
  check_matrix(op, "codes", codes, grad, ScalarType::Byte, 3, grad.numel());
  cuda::ScaleArguments a{};
  a.kept = codes.const_data_ptr();
  return scale<cuda::Codes>(op, grad, reduce, a, 1);
}

std::tuple<Tensor, Tensor> level_scale(const Tensor& grad, const Tensor& planes, const Tensor& levels,
                                       int64_t reduce) {
  constexpr const char* op = "level_scale";
  check_reduced(op, grad, reduce);
  check_matrix(op, "planes", planes, grad, ScalarType::Byte, 3, bytes_of_bits(grad.numel()));
  check_vector(op, "levels", levels, grad, ScalarType::Float, 8);
  cuda::ScaleArguments a{};
  a.kept = planes.const_data_ptr();
  a.table = levels.const_data_ptr<float>();
  return scale<cuda::Levels>(op, grad, reduce, a, 0);
}

std::tuple<Tensor, Tensor> affine_grad(const Tensor& grad, const Tensor& factors, int64_t reduce) {
  constexpr const char* op = "affine_grad";
  check_reduced(op, grad, reduce);
  check(reduce != 0, op, "reduce must be 1 or 2, not 0");
  check_vector(op, "scale", factors, grad, ScalarType::Float, grad.size(3 - reduce));
  cuda::ScaleArguments a{};
  a.table = factors.const_data_ptr<float>();
  return scale<cuda::Columns>(op, grad, reduce, a, 0);
}

}  // namespace dpk
