// What kernels share that sum a [B, T, p] tensor over T: the cut into blocks, and where the threads' sums meet.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch_plan.h"

namespace dpk {
namespace cuda {

constexpr int kReduceThreads = 256;

struct BiasGradArguments {
  const void* grad;  // [B, T, p]
  float* out;        // [B, splits, p], neighbouring columns
  int64_t steps, features;                                // T, p
  int64_t stride_batch, stride_steps, stride_features;    // of grad, in elements
  int64_t stride_out_batch, stride_out_split;             // of out, in elements
  int64_t chunk;                                          // steps that one block sums
  int64_t splits, tiles;                                  // blocks along T and along p
  int lanes;                                              // threads side by side along the contiguous dimension
  bool accumulate;                                        // add to out instead of writing it
};

// Which part of the tensor a block sums.
struct Part {
  int64_t sample, split, tile, first, count;  // steps first ... first + count - 1
};

__device__ inline Part part_of_block(const BiasGradArguments& a) {
  const int64_t block = blockIdx.x;
  Part part{};
  part.tile = block % a.tiles;
  part.split = block / a.tiles % a.splits;
  part.sample = block / a.tiles / a.splits;
  part.first = part.split * a.chunk;
  part.count = a.steps - part.first < a.chunk ? a.steps - part.first : a.chunk;
  return part;
}

__device__ inline void put(const BiasGradArguments& a, const Part& part, int64_t column, float sum) {
  float* to = a.out + part.sample * a.stride_out_batch + part.split * a.stride_out_split + column;
  *to = a.accumulate ? *to + sum : sum;
}

// Sums of the columns from `column` on: the rows' threads meet in shared memory, halving their number each time, in the
// same order in every run.
template <int kCount>
__device__ inline void fold_rows(const BiasGradArguments& a, const Part& part, int64_t column,
                                 const float (&sum)[kCount]) {
  const int thread = threadIdx.x;
  __shared__ float shared[kCount][kReduceThreads];  // [i][thread]: neighbouring threads, neighbouring banks
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[i][thread] = sum[i];
  for (int half = kReduceThreads / 2; half >= a.lanes; half /= 2) {
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i][thread] += shared[i][thread + half];
    }
  }
  __syncthreads();
  if (thread < a.lanes && column < a.features) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) put(a, part, column + i, shared[i][thread]);
  }
}

// Sum of a channel: the lanes' meet by shuffles inside a warp, then through shared memory where a channel has several.
template <int kCount>
__device__ inline void fold_lanes(const BiasGradArguments& a, const Part& part, int64_t channel,
                                  const float (&sum)[kCount]) {
  const int thread = threadIdx.x, lane = thread % a.lanes;
  float whole = sum_of_lanes(sum_of(sum), a.lanes < kWarp ? a.lanes : kWarp);
  if (a.lanes > kWarp) {
    __shared__ float of_warp[kReduceThreads / kWarp];
    const int warp = thread / kWarp, warps = a.lanes / kWarp;
    if (thread % kWarp == 0) of_warp[warp] = whole;
    __syncthreads();
    whole = of_warp[warp];
    if (lane == 0) {
      for (int w = 1; w < warps; ++w) whole += of_warp[warp + w];
    }
  }
  if (lane == 0 && channel < a.features) put(a, part, channel, whole);
}

}  // namespace cuda
}  // namespace dpk
