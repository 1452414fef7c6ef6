// Squared norms of sum over t of left_t right_t^T, by Gram matrices: left [B, T, p], right [B, T, d] -> [B] float64.
#include <vector>

#include "cpu/inputs.h"
#include "ops.h"

namespace dpk {

Tensor ghost_squares(const Tensor& left, const Tensor& right) {
  constexpr const char* op = "ghost_squares";
  check_tensor(op, "left", left, ScalarType::Float, 3);
  check_tensor(op, "right", right, ScalarType::Float, 3);
  check_device(op, "right", right, left);
  const int64_t batch = left.size(0), steps = left.size(1), width = left.size(2), depth = right.size(2);
  check(right.size(0) == batch && right.size(1) == steps, op, "right [", right.size(0), ", ", right.size(1),
        ", ...] does not fit left [", batch, ", ", steps, ", ...]");
  check((width <= 1 || left.stride(2) == 1) && (depth <= 1 || right.stride(2) == 1), op,
        "neighbours in a row of left and of right must lie side by side");

  const Kernels& loops = kernels();
  const Tensor result = empty_beside(left, {batch}, ScalarType::Double);
  const int64_t parts = (steps + loops.ghost_rows - 1) / loops.ghost_rows;
  std::vector<double> sums(static_cast<size_t>(batch * parts), 0.0);
  const float *l = left.const_data_ptr<float>(), *r = right.const_data_ptr<float>();
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / parts, first = item % parts * loops.ghost_rows;
      sums[item] = loops.ghost_squares(l + i * left.stride(0), left.stride(1), width, r + i * right.stride(0),
                                       right.stride(1), depth, steps, first);
    }
  });
  double* out = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < batch; ++i) {
    out[i] = 0.0;
    for (int64_t part = 0; part < parts; ++part) out[i] += sums[i * parts + part];
  }
  return result;
}

}  // namespace dpk
