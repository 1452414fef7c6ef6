// Squared norms of sum over t of left_t right_t^T by Gram matrices, left [B, T, p], right [B, T, d] -> [B] float64, and
// the sums over t of |left_t| |right_t|, |left_t| and |right_t| -> [3, B] float64.
#include <vector>

#include "cpu/inputs.h"
#include "ops.h"

namespace dpk {

std::tuple<Tensor, Tensor> ghost_squares(const Tensor& left, const Tensor& right) {
  check_factors("ghost_squares", left, right);
  const int64_t batch = left.size(0), steps = left.size(1), width = left.size(2), depth = right.size(2);
  const ReleaseKernels& loops = *kernels().release;
  const Tensor squares = empty_beside(left, {batch}, ScalarType::Double);
  const Tensor sizes = empty_beside(left, {3, batch}, ScalarType::Double);
  const int64_t parts = (steps + kBlock - 1) / kBlock;
  std::vector<GhostSums> sums(static_cast<size_t>(batch * parts));
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch& own = scratch();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / parts, first = item % parts * kBlock;
      sums[item] = loops.ghost_squares(terms_of(left, i), width, terms_of(right, i), depth, steps, first, own);
    }
  });
  double *square = squares.mutable_data_ptr<double>(), *size = sizes.mutable_data_ptr<double>();
  for (int64_t i = 0; i < batch; ++i) {
    GhostSums all = {};
    for (int64_t part = 0; part < parts; ++part) {
      const GhostSums& one = sums[i * parts + part];
      all.square += one.square, all.products += one.products, all.lefts += one.lefts, all.rights += one.rights;
    }
    square[i] = all.square;
    size[i] = all.products, size[batch + i] = all.lefts, size[2 * batch + i] = all.rights;
  }
  return {squares, sizes};
}

}  // namespace dpk
