// Per-sample bias gradient: rows [B, p] = sum over T of grad [B, T, p], one visit to grad.
#include "cuda/bias_grad_kernel.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace dpk {

namespace {

int type_number(ScalarType type) { return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2; }

// One launch, or, for a T too long for one block, two: partial sums [B, splits, p], then the sum of those.
void reduce(const char* op, const Tensor& rows, const Tensor& grad, bool accumulate) {
  const int64_t batch = grad.size(0), features = grad.size(2);
  if (batch == 0 || features == 0) return;
  const ScalarType type = grad.scalar_type();
  const cuda::BiasGradShape shape{batch,          grad.size(1),   features,
                                  grad.stride(0), grad.stride(1), grad.stride(2),
                                  type == ScalarType::Float ? 4 : 2,
                                  reinterpret_cast<uintptr_t>(grad.const_data_ptr())};
  const cuda::BiasGradPlan plan = cuda::plan_bias_grad(shape);
  const bool two_stages = plan.splits > 1;
  const Tensor out = two_stages ? empty_beside(grad, {batch, plan.splits, features}, ScalarType::Float) : rows;
  cuda::BiasGradArguments a{};
  a.grad = grad.const_data_ptr();
  a.out = out.mutable_data_ptr<float>();
  a.steps = shape.steps;
  a.features = features;
  a.stride_batch = shape.stride_batch;
  a.stride_steps = shape.stride_steps;
  a.stride_features = shape.stride_features;
  a.stride_out_batch = out.stride(0);
  a.stride_out_split = two_stages ? features : 0;
  a.chunk = plan.chunk;
  a.splits = plan.splits;
  a.tiles = plan.tiles;
  a.lanes = plan.lanes;
  a.accumulate = accumulate && !two_stages;
  {
    const cuda::OnDeviceOf device(grad);
    cuda::launch(op, cuda::bias_grad_kernel(type_number(type), plan.layout, plan.packet), batch * plan.splits * plan.tiles,
                 cuda::kReduceThreads, device, a);
  }
  if (two_stages) reduce(op, rows, out, accumulate);
}

}  // namespace

Tensor bias_grad(const Tensor& grad) {
  check_grad("bias_grad", grad);
  const Tensor rows = empty_beside(grad, {grad.size(0), grad.size(2)}, ScalarType::Float);
  reduce("bias_grad", rows, grad, false);
  return rows;
}

void bias_grad_(const Tensor& rows, const Tensor& grad) {
  check_grad("bias_grad_", grad);
  check_rows_of("bias_grad_", rows, grad);
  reduce("bias_grad_", rows, grad, true);
}

}  // namespace dpk
