// total [p, d] int64 += sum over samples of floor(factor * row + 0.5), row = sum over t of left_t right_t^T, of which only
// a block at a time is made.
#include <algorithm>
#include <memory>

#include "cpu/inputs.h"
#include "ops.h"

namespace dpk {

Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> own;  // most threads never ask
  if (own == nullptr) own.reset(new Scratch);
  return *own;
}

void clipped_outer_sum_(const Tensor& total, const Tensor& left, const Tensor& right, const Tensor& factors,
                        bool fresh) {
  constexpr const char* op = "clipped_outer_sum_";
  check_factors(op, left, right);
  const int64_t batch = left.size(0), steps = left.size(1), width = left.size(2), depth = right.size(2);
  check_tensor(op, "total", total, ScalarType::Long, 1);
  check_tensor(op, "factors", factors, ScalarType::Double, 1);
  check_device(op, "total", total, left);
  check_device(op, "factors", factors, left);
  check(total.size(0) == width * depth && (total.numel() <= 1 || total.stride(0) == 1), op, "total has ",
        total.size(0), " elements, not neighbours in memory or not p * d = ", width * depth);
  check(factors.size(0) == batch && (batch <= 1 || factors.stride(0) == 1), op, "factors has ", factors.size(0),
        " elements, not neighbours in memory or not B = ", batch);

  const double* factor = factors.const_data_ptr<double>();
  int64_t* out = total.mutable_data_ptr<int64_t>();
  const ReleaseKernels& loops = *kernels().release;
  const int64_t across = (depth + kBlock - 1) / kBlock, blocks = (width + kBlock - 1) / kBlock * across;
  // A block of total stays in the second-level cache while the samples pass.
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch& own = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / across * kBlock, column = item % across * kBlock;
      const int64_t rows = std::min(width - row, kBlock), columns = std::min(depth - column, kBlock);
      for (int64_t k = 0; fresh && k < rows; ++k) {
        std::fill_n(out + (row + k) * depth + column, columns, int64_t{0});
      }
      for (int64_t i = 0; i < batch; ++i) {
        if (factor[i] == 0.0) continue;  // selects the sample away, whatever it holds
        loops.add_outer_sum(out + row * depth + column, depth, terms_of(left, i).from(0, row), rows,
                            terms_of(right, i).from(0, column), columns, steps, factor[i], own);
      }
    }
  });
}

}  // namespace dpk
