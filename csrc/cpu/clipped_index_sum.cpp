// total [V, d] int64 += floor(factor * vector + 0.5) at the row that each vector's number names.
#include <algorithm>

#include "cpu/inputs.h"
#include "ops.h"
#include "plan.h"

namespace dpk {

void clipped_index_sum_(const Tensor& total, const Tensor& ids, const Tensor& vectors, const Tensor& factors) {
  constexpr const char* op = "clipped_index_sum_";
  check_contiguous(op, "total", total, vectors, ScalarType::Long, 2);
  check_contiguous(op, "ids", ids, vectors, ScalarType::Long, 2);
  check_contiguous(op, "vectors", vectors, vectors, ScalarType::Float, 3);
  check_contiguous(op, "factors", factors, vectors, ScalarType::Double, 1);
  const int64_t batch = vectors.size(0), terms = vectors.size(1), width = vectors.size(2), rows = total.size(0);
  check(ids.size(0) == batch && ids.size(1) == terms && factors.size(0) == batch && total.size(1) == width, op,
        "vectors [", batch, ", ", terms, ", ", width, "] do not fit ids [", ids.size(0), ", ", ids.size(1),
        "], factors [", factors.size(0), "] and total [", rows, ", ", total.size(1), "]");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * terms; ++i) {
    check(id[i] >= 0 && id[i] < rows, op, "ids must lie in [0, ", rows, "), not ", id[i]);
  }
  const float* in = vectors.const_data_ptr<float>();
  const double* factor = factors.const_data_ptr<double>();
  int64_t* out = total.mutable_data_ptr<int64_t>();
  const ReleaseKernels& loops = *kernels().release;
  constexpr int64_t part = 64;  // columns: two vectors of one number never meet in two threads
  const int64_t parts = (width + part - 1) / part;
  torch::stable::parallel_for(0, parts, plan_grain(batch * terms * part * 4), [&](int64_t begin, int64_t end) {
    const int64_t left = begin * part, count = std::min(end * part, width) - left;
    for (int64_t i = 0; i < batch; ++i) {
      if (factor[i] == 0.0) continue;  // selects the sample away, whatever it holds
      for (int64_t t = 0; t < terms; ++t) {
        const int64_t term = i * terms + t;
        loops.add_rounded(out + id[term] * width + left, in + term * width + left, count, factor[i]);
      }
    }
  });
}

}  // namespace dpk
