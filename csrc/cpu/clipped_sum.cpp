// total [P] int64 += sum over rows of floor(row * factor + 0.5). Integer sums: exact, whatever the order.
#include "cpu/inputs.h"
#include "ops.h"
#include "plan.h"

namespace dpk {

void clipped_sum_(const Tensor& total, const Tensor& rows, const Tensor& offsets, const Tensor& factors) {
  const int64_t groups = check_sum(total, rows, offsets, factors);
  const int64_t batch = rows.size(0), columns = rows.size(1);
  check_offsets("clipped_sum_", offsets, columns);

  const float* in = rows.const_data_ptr<float>();
  const int64_t stride = rows.stride(0);
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const double* factor = factors.const_data_ptr<double>();
  int64_t* out = total.mutable_data_ptr<int64_t>();
  const ReleaseKernels& loops = *kernels().release;
  constexpr int64_t tile = 512;  // 4 KiB of total stays in the first-level cache while the rows pass

  const int64_t tiles = (columns + tile - 1) / tile;
  torch::stable::parallel_for(0, tiles, plan_grain(batch * tile * 4), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t left = item * tile, right = left + tile < columns ? left + tile : columns;
      for (int64_t i = 0; i < batch; ++i) {
        for (int64_t l = 0; l < groups && at[l] < right; ++l) {
          const int64_t from = at[l] > left ? at[l] : left, to = at[l + 1] < right ? at[l + 1] : right;
          // A factor of zero selects the row away, whatever it holds.
          if (from >= to || factor[i * groups + l] == 0.0) continue;
          loops.add_rounded(out + from, in + i * stride + from, to - from, factor[i * groups + l]);
        }
      }
    }
  });
}

}  // namespace dpk
