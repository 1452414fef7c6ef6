// Norm and clip factor of every sample and group: factors, norms [B, L] float64, in one launch.
#include "cuda/clip_factors_kernel.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace dpk {

std::tuple<Tensor, Tensor> clip_factors(const Tensor& rows, const Tensor& offsets, const Tensor& mask,
                                        const Tensor& bounds, const Tensor& grid,
                                        const std::optional<Tensor>& extra_squares, double scale,
                                        const std::optional<double>& gamma) {
  const int64_t groups = check_clip(rows, offsets, mask, bounds, grid, extra_squares, scale, gamma);
  const int64_t batch = rows.size(0);
  const Tensor factors = empty_beside(rows, {batch, groups}, ScalarType::Double);
  const Tensor norms = empty_beside(rows, {batch, groups}, ScalarType::Double);
  if (batch == 0) return {factors, norms};
  cuda::ClipArguments a{};
  a.rows = rows.const_data_ptr<float>();
  a.stride = rows.stride(0);
  a.offsets = offsets.const_data_ptr<int64_t>();
  a.mask = mask.const_data_ptr<bool>();
  a.bounds = bounds.const_data_ptr<double>();
  a.grid = grid.const_data_ptr<double>();
  a.extra = extra_squares ? extra_squares->const_data_ptr<double>() : nullptr;
  a.factors = factors.mutable_data_ptr<double>();
  a.norms = norms.mutable_data_ptr<double>();
  a.groups = groups;
  a.scale = scale;
  a.gamma = gamma.value_or(0.0);
  a.flat = !gamma.has_value();
  const cuda::OnDeviceOf device(rows);
  cuda::launch("clip_factors", cuda::clip_factors_kernel, batch, cuda::kNormThreads, device, a);
  return {factors, norms};
}

}  // namespace dpk
