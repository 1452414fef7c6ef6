// Backward of norms, with the per-sample sum of the gradient from the same visit; and what a norm keeps in 8 bits.
#include "cuda/launch.cuh"
#include "cuda/norm_grad_launch.cuh"
#include "checks_backward.h"
#include "ops.h"

namespace dpk {

namespace {

int type_number(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}

int item_bytes(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? 4 : x.scalar_type() == ScalarType::Char ? 1 : 2;
}

cuda::NormArguments norm_arguments(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                   const Tensor& scale, const Tensor& rstd, const std::optional<Tensor>& weight,
                                   const Tensor& dx) {
  cuda::NormArguments a{};
  a.grad = grad.const_data_ptr();
  a.x = x.const_data_ptr();
  a.shift = shift ? shift->const_data_ptr<float>() : nullptr;
  a.scale = scale.const_data_ptr<float>();
  a.rstd = rstd.const_data_ptr<float>();
  a.weight = weight ? weight->const_data_ptr<float>() : nullptr;
  a.dx = dx.mutable_data_ptr();
  return a;
}

void zero(Tensor rows) {
  if (rows.numel() > 0) torch::stable::zero_(rows);
}

// Groups [K, S] of a sample, G of them.
void group_norm(const char* op, const Tensor& grad, const Tensor& x, cuda::NormArguments a, int64_t all, int64_t groups,
                int64_t channels, int64_t length, const cuda::OnDeviceOf& device) {
  a.length = channels;
  a.width = length;
  const int packet = cuda::plan_group_norm(a, groups, item_bytes(grad), item_bytes(x));
  const bool packed = x.scalar_type() == ScalarType::Char;
  cuda::launch(op, cuda::norm_kernel(false, type_number(grad), packed, packet), all, a.threads, device, a);
}

}  // namespace

std::tuple<Tensor, Tensor> layer_norm_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                           const Tensor& scale, const Tensor& rstd,
                                           const std::optional<Tensor>& weight, int64_t reduce) {
  constexpr const char* op = "layer_norm_grad";
  check_layer_norm(grad, x, shift, scale, rstd, weight, reduce);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const cuda::OnDeviceOf device(grad);
  if (grad.numel() == 0) {
    zero(rows);
    return {dx, rows};
  }
  const int64_t batch = grad.size(0);
  cuda::NormArguments a = norm_arguments(grad, x, shift, scale, rstd, weight, dx);
  a.length = grad.size(1);
  a.width = grad.size(2);
  const int packet = cuda::plan_layer_norm(a, item_bytes(grad), item_bytes(x));
  if (packet == 0) {  // as a group of C channels of one position
    group_norm(op, grad, x, a, batch * a.length, 1, a.width, 1, device);
    return {dx, reduce == 1 ? bias_grad(grad) : rows};
  }
  const bool two_stages = reduce == 1 && a.splits > 1;
  const Tensor out = two_stages ? empty_beside(grad, {batch, a.splits, a.width}, ScalarType::Float) : rows;
  a.out = reduce == 1 ? out.mutable_data_ptr<float>() : nullptr;
  const bool packed = x.scalar_type() == ScalarType::Char;
  cuda::launch(op, cuda::norm_kernel(true, type_number(grad), packed, packet), batch * a.splits, a.threads, device, a);
  return {dx, two_stages ? bias_grad(out) : rows};
}

std::tuple<Tensor, Tensor> group_norm_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                           const Tensor& scale, const Tensor& rstd,
                                           const std::optional<Tensor>& weight) {
  const int64_t groups = check_group_norm(grad, x, shift, scale, rstd, weight);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, 2);
  const cuda::OnDeviceOf device(grad);
  if (grad.numel() == 0) {
    zero(rows);
    return {dx, rows};
  }
  cuda::NormArguments a = norm_arguments(grad, x, shift, scale, rstd, weight, dx);
  a.out = rows.mutable_data_ptr<float>();
  group_norm("group_norm_grad", grad, x, a, grad.size(0) * groups, groups, grad.size(1) / groups, grad.size(2), device);
  return {dx, rows};
}

std::tuple<Tensor, Tensor> quantize_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  constexpr const char* op = "quantize_norm";
  check_float(op, "x", x);
  check(x.dim() == 2, op, "x must be [M, N], not of ", x.dim(), " dimensions");
  const int64_t count = x.size(0), width = x.size(1);
  check_vector(op, "mean", mean, x, ScalarType::Float, count);
  check_vector(op, "rstd", rstd, x, ScalarType::Float, count);
  const Tensor codes = empty_beside(x, {count, width}, ScalarType::Char);
  const Tensor scale = empty_beside(x, {count}, ScalarType::Float);
  if (count == 0) return {codes, scale};
  cuda::QuantizeArguments a{};
  a.x = x.const_data_ptr();
  a.mean = mean.const_data_ptr<float>();
  a.rstd = rstd.const_data_ptr<float>();
  a.codes = codes.mutable_data_ptr<int8_t>();
  a.scale = scale.mutable_data_ptr<float>();
  a.count = count;
  a.width = width;
  const cuda::QuantizeKernel kernel = cuda::plan_quantize_norm(a, type_number(x));
  const cuda::OnDeviceOf device(x);
  cuda::launch(op, kernel, cuda::blocks_of(a), cuda::kNormGradThreads, device, a);
  return {codes, scale};
}

}  // namespace dpk
