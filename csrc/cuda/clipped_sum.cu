// total [P] int64 += sum over rows of floor(row * factor + 0.5). Integer sums: exact, whatever the order.
#include "cuda/clipped_sum_kernel.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace dpk {

void clipped_sum_(const Tensor& total, const Tensor& rows, const Tensor& offsets, const Tensor& factors) {
  const int64_t groups = check_sum(total, rows, offsets, factors);
  cuda::SumArguments a{};
  a.batch = rows.size(0);
  a.columns = rows.size(1);
  if (a.batch == 0 || a.columns == 0) return;
  a.groups = groups;
  a.total = total.mutable_data_ptr<int64_t>();
  a.rows = rows.const_data_ptr<float>();
  a.stride = rows.stride(0);
  a.offsets = offsets.const_data_ptr<int64_t>();
  a.factors = factors.const_data_ptr<double>();
  const cuda::OnDeviceOf device(rows);
  cuda::launch("clipped_sum_", cuda::clipped_sum_kernel_for(a), cuda::blocks_of(a), cuda::kSumThreads, device, a);
}

}  // namespace dpk
