// Norm and clip factor of every sample and group: factors, norms [B, L] float64.
#include <cmath>

#include "cpu/inputs.h"
#include "ops.h"
#include "plan.h"

namespace dpk {

std::tuple<Tensor, Tensor> clip_factors(const Tensor& rows, const Tensor& offsets, const Tensor& mask,
                                        const Tensor& bounds, const Tensor& grid,
                                        const std::optional<Tensor>& extra_squares, double scale,
                                        const std::optional<double>& gamma) {
  const int64_t groups = check_clip(rows, offsets, mask, bounds, grid, extra_squares, scale, gamma);
  const int64_t batch = rows.size(0), columns = rows.size(1);
  check_offsets("clip_factors", offsets, columns);

  const Tensor factors = empty_beside(rows, {batch, groups}, ScalarType::Double);
  const Tensor norms = empty_beside(rows, {batch, groups}, ScalarType::Double);
  if (batch == 0) return {factors, norms};

  const float* in = rows.const_data_ptr<float>();
  const int64_t stride = rows.stride(0);
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const bool* keep = mask.const_data_ptr<bool>();
  const double* bound = bounds.const_data_ptr<double>();
  const double* cells = grid.const_data_ptr<double>();
  const double* extra = extra_squares ? extra_squares->const_data_ptr<double>() : nullptr;
  double* factor = factors.mutable_data_ptr<double>();
  double* norm = norms.mutable_data_ptr<double>();
  const ReleaseKernels& loops = *kernels().release;

  torch::stable::parallel_for(0, batch, plan_grain(columns * 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      bool usable = keep[i];
      for (int64_t l = 0; l < groups; ++l) {
        double square = loops.sum_of_squares(in + i * stride + at[l], at[l + 1] - at[l]);
        if (extra != nullptr) square += extra[i * groups + l];
        norm[i * groups + l] = scale * std::sqrt(square);
        usable = usable && std::isfinite(norm[i * groups + l]);
      }
      for (int64_t l = 0; l < groups; ++l) {
        const double size = norm[i * groups + l];
        const double reach = gamma ? size + *gamma : (size > bound[l] ? size : bound[l]);
        factor[i * groups + l] = usable ? cells[l] * scale / reach : 0.0;
      }
    }
  });
  return {factors, norms};
}

}  // namespace dpk
