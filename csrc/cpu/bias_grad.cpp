// Per-sample bias gradient: rows [B, p] = sum over T of grad [B, T, p], one visit to grad.
#include "checks.h"
#include "cpu/isa.h"
#include "ops.h"
#include "plan.h"

namespace dpk {

namespace {

Type element_type(const Tensor& grad) {
  const ScalarType type = grad.scalar_type();
  return type == ScalarType::Float ? Type::float32 : type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float16;
}

// rows [B, p] with any row stride and column stride 1; grad [B, T, p] with any strides.
void reduce(const Tensor& rows, const Tensor& grad, bool accumulate) {
  const Type type = element_type(grad);
  const int64_t batch = grad.size(0), steps = grad.size(1), features = grad.size(2);
  if (batch == 0 || features == 0) return;
  const int64_t stride_batch = grad.stride(0), stride_steps = grad.stride(1), stride_features = grad.stride(2);
  const int64_t bytes = type == Type::float32 ? 4 : 2;
  const BiasGradPlan plan = plan_bias_grad(batch, steps, features, stride_steps, stride_features, bytes);
  const char* in = static_cast<const char*>(grad.const_data_ptr());
  float* out = rows.mutable_data_ptr<float>();
  const int64_t stride_rows = rows.stride(0);
  const Kernels& loops = kernels();
  const int kind = static_cast<int>(type);

  torch::stable::parallel_for(0, batch * plan.tiles, plan.grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / plan.tiles, column = item % plan.tiles * plan.tile;
      const bool last = item % plan.tiles == plan.tiles - 1;
      const int64_t width = last ? features - column : plan.tile;
      const void* from = in + (sample * stride_batch + column * stride_features) * bytes;
      float* to = out + sample * stride_rows + column;
      switch (plan.layout) {
        case Layout::features_last:
          loops.features_last[kind](from, steps, stride_steps, width, to, accumulate);
          break;
        case Layout::channels_first:
          loops.channels_first[kind](from, steps, stride_features, width, to, accumulate);
          break;
        case Layout::strided:
          loops.strided[kind](from, steps, stride_steps, stride_features, width, to, accumulate);
          break;
      }
    }
  });
}

}  // namespace

Tensor bias_grad(const Tensor& grad) {
  check_grad("bias_grad", grad);
  const Tensor rows = empty_beside(grad, {grad.size(0), grad.size(2)}, ScalarType::Float);
  reduce(rows, grad, false);
  return rows;
}

void bias_grad_(const Tensor& rows, const Tensor& grad) {
  check_grad("bias_grad_", grad);
  check_rows_of("bias_grad_", rows, grad);
  reduce(rows, grad, true);
}

}  // namespace dpk
