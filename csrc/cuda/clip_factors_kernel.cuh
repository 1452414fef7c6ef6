// Loop of clip_factors: float64 norms of the ledger's rows by group, and the factors that clip them.
#pragma once

#include "cuda/device.cuh"

namespace dpk {
namespace cuda {

constexpr int kNormThreads = 1024;
constexpr int kNormWarps = kNormThreads / kWarp;
constexpr int64_t kWideGroup = 8192;  // elements from which a whole block takes a group, not one warp

struct ClipArguments {
  const float* rows;        // [B, P], neighbouring columns
  int64_t stride;           // of a row, in elements
  const int64_t* offsets;   // [L + 1]
  const bool* mask;         // [B]
  const double* bounds;     // [L]
  const double* grid;       // [L]
  const double* extra;      // [B, L] or null
  double* factors;          // [B, L]
  double* norms;            // [B, L]
  int64_t groups;           // L
  double scale, gamma;
  bool flat;                // factor grid / max(norm, bound); else grid / (norm + gamma)
};

// This thread's share of the sum of squares of `count` neighbouring elements: the `lanes` threads read packets side by
// side, the first and last elements that fill no aligned packet one by one. A square of a float32 is exact in float64.
__device__ inline double share_of_squares(const float* in, int64_t count, int lane, int lanes) {
  const int64_t ahead = (4 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(in) / 4 % 4)) % 4;
  const int64_t head = ahead < count ? ahead : count;
  const int64_t packets = (count - head) / 4;
  const float* body = in + head;
  double sum[4] = {};
  int64_t k = lane;
  for (; k + 3 * int64_t{lanes} < packets; k += 4 * int64_t{lanes}) {
    Packet<float, 4> packet[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) packet[u] = load_packet<float, 4>(body + 4 * (k + u * int64_t{lanes}));
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const double value = packet[u].value[i];
        sum[i] += value * value;
      }
    }
  }
  for (; k < packets; k += lanes) {
    const auto packet = load_packet<float, 4>(body + 4 * k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double value = packet.value[i];
      sum[i] += value * value;
    }
  }
  const int64_t tail = head + 4 * packets;  // fewer than four elements on either side
  if (lane < head) sum[0] += double{in[lane]} * double{in[lane]};
  if (tail + lane < count && lane < 4) sum[1] += double{in[tail + lane]} * double{in[tail + lane]};
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// One block serves one row, whole: 1,024 threads with four 16-byte loads in flight each are 64 KiB, which keeps an SM's
// share of the memory busy, and no second launch or counter is needed to put a row's parts together. Groups of
// kWideGroup elements and more are summed by the whole block one after another, the others by a warp each. A row's
// factors come last: all 0.0 where the mask, or one norm that is not finite, says so.
// Example: P = 300,000 in one group: 73 packets a thread, 32 warps' sums added by the first warp. With 300 groups of
// 1,000: 8 packets a lane, 9 or 10 groups a warp.
__global__ void __launch_bounds__(kNormThreads) clip_factors_kernel(const ClipArguments a) {
  __shared__ double of_warp[kNormWarps];
  __shared__ int dropped;
  const int64_t row = blockIdx.x;
  const float* in = a.rows + row * a.stride;
  double* norms = a.norms + row * a.groups;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  if (thread == 0) dropped = !a.mask[row];

  for (int64_t l = 0; l < a.groups; ++l) {
    const int64_t begin = a.offsets[l], count = a.offsets[l + 1] - begin;
    if (count < kWideGroup) continue;
    const double share = sum_of_lanes(share_of_squares(in + begin, count, thread, kNormThreads), kWarp);
    __syncthreads();  // the sums of the group before were read
    if (lane == 0) of_warp[warp] = share;
    __syncthreads();
    if (warp == 0) {
      const double square = sum_of_lanes(of_warp[lane], kWarp);
      if (lane == 0) norms[l] = square;
    }
  }
  for (int64_t l = warp; l < a.groups; l += kNormWarps) {
    const int64_t begin = a.offsets[l], count = a.offsets[l + 1] - begin;
    if (count >= kWideGroup) continue;
    const double square = sum_of_lanes(share_of_squares(in + begin, count, lane, kWarp), kWarp);
    if (lane == 0) norms[l] = square;
  }
  __syncthreads();  // every square is in place, and so is `dropped`

  for (int64_t l = thread; l < a.groups; l += kNormThreads) {
    const double square = a.extra != nullptr ? norms[l] + a.extra[row * a.groups + l] : norms[l];
    const double norm = a.scale * sqrt(square);
    norms[l] = norm;
    if (!(fabs(norm) < INFINITY)) dropped = 1;  // whoever writes it, writes the same
  }
  __syncthreads();
  for (int64_t l = thread; l < a.groups; l += kNormThreads) {
    const double norm = norms[l];
    const double reach = a.flat ? (norm > a.bounds[l] ? norm : a.bounds[l]) : norm + a.gamma;
    a.factors[row * a.groups + l] = dropped ? 0.0 : a.grid[l] * a.scale / reach;
  }
}

}  // namespace cuda
}  // namespace dpk
