// Loops of bias_grad: rows [B, p] = sum over T of grad [B, T, p], or partial sums [B, splits, p] of chunks of T.
#pragma once

#include "cuda/reduce.cuh"

namespace dpk {
namespace cuda {

constexpr int kUnroll = 4;  // packets in flight a thread: 64 bytes, some 128 KiB an SM at full occupancy

// Pairs first: a quarter of the additions in a chain, and of its rounding.
template <class Element, int kCount>
__device__ inline float sum_of_four(const Packet<Element, kCount> (&packet)[kUnroll], int i) {
  static_assert(kUnroll == 4);
  return (to_float(packet[0].value[i]) + to_float(packet[1].value[i])) +
         (to_float(packet[2].value[i]) + to_float(packet[3].value[i]));
}

// Features last (and, with packets of one element, any strides). A block owns `lanes` packets of neighbouring columns
// and walks down its chunk of T, 256 / lanes rows at a time: the lanes of one row read 128 contiguous bytes where p
// allows it, a whole line, so nothing that is fetched is left unused. Each thread keeps the sums of its columns; those
// of the rows' threads meet in shared memory, halving their number each time: the same order in every run.
// Example: p = 768 in bfloat16. A packet holds 8 columns, 8 lanes cover 64, 12 blocks a sample (and chunk) cover p;
// 32 rows at a time, so that T = 512 is 4 times 4 additions a thread and 5 halvings.
template <class Element, int kCount>
__global__ void __launch_bounds__(kReduceThreads) bias_grad_features_last_kernel(const BiasGradArguments a) {
  const Part part = part_of_block(a);
  const int thread = threadIdx.x, lane = thread % a.lanes;
  const int row = thread / a.lanes, rows = kReduceThreads / a.lanes;
  const int64_t column = (part.tile * a.lanes + lane) * kCount;
  const int64_t step = a.stride_steps * rows;

  float sum[kCount] = {};
  if (column < a.features) {
    const Element* from = static_cast<const Element*>(a.grad) + part.sample * a.stride_batch +
                          (part.first + row) * a.stride_steps + column * (kCount == 1 ? a.stride_features : 1);
    int64_t t = row;
    for (; t + (kUnroll - 1) * rows < part.count; t += kUnroll * rows, from += kUnroll * step) {
      Packet<Element, kCount> packet[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packet[u] = load_packet<Element, kCount>(from + u * step);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += sum_of_four(packet, i);
    }
    for (; t < part.count; t += rows, from += step) {
      const auto packet = load_packet<Element, kCount>(from);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += to_float(packet.value[i]);
    }
  }

  fold_rows<kCount>(a, part, column, sum);
}

// Channels first: T is contiguous. `lanes` threads share one channel and read its positions a packet each, side by
// side; a block serves 256 / lanes channels. Short images take few lanes, so that every thread has several packets to
// sum before the lanes' sums meet: by shuffles inside a warp, then through shared memory where a channel has several.
// Example: 56 x 56 in bfloat16: 392 packets of 8, 64 lanes with 6 or 7 each, 4 channels a block.
template <class Element, int kCount>
__global__ void __launch_bounds__(kReduceThreads) bias_grad_channels_first_kernel(const BiasGradArguments a) {
  const Part part = part_of_block(a);
  const int thread = threadIdx.x, lane = thread % a.lanes;
  const int64_t channel = part.tile * (kReduceThreads / a.lanes) + thread / a.lanes;
  const int64_t packets = part.count / kCount;

  float sum[kCount] = {};
  if (channel < a.features) {
    const Element* from = static_cast<const Element*>(a.grad) + part.sample * a.stride_batch +
                          channel * a.stride_features + part.first + int64_t{lane} * kCount;
    const int64_t step = int64_t{a.lanes} * kCount;
    int64_t k = lane;
    for (; k + (kUnroll - 1) * a.lanes < packets; k += kUnroll * a.lanes, from += kUnroll * step) {
      Packet<Element, kCount> packet[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packet[u] = load_packet<Element, kCount>(from + u * step);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += sum_of_four(packet, i);
    }
    for (; k < packets; k += a.lanes, from += step) {
      const auto packet = load_packet<Element, kCount>(from);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += to_float(packet.value[i]);
    }
  }
  fold_lanes<kCount>(a, part, channel, sum);
}

using BiasGradKernel = void (*)(BiasGradArguments);

template <class Element, int kCount>
BiasGradKernel bias_grad_kernel(Layout layout) {
  return layout == Layout::channels_first ? bias_grad_channels_first_kernel<Element, kCount>
                                          : bias_grad_features_last_kernel<Element, kCount>;
}

template <class Element>
BiasGradKernel bias_grad_kernel(Layout layout, int packet) {
  if constexpr (sizeof(Element) == 2) {
    if (packet == 8) return bias_grad_kernel<Element, 8>(layout);
  }
  switch (packet) {
    case 4:
      return bias_grad_kernel<Element, 4>(layout);
    case 2:
      return bias_grad_kernel<Element, 2>(layout);
    default:
      return bias_grad_kernel<Element, 1>(layout);
  }
}

// type: 0 float32, 1 bfloat16, 2 float16
inline BiasGradKernel bias_grad_kernel(int type, Layout layout, int packet) {
  switch (type) {
    case 1:
      return bias_grad_kernel<BFloat16>(layout, packet);
    case 2:
      return bias_grad_kernel<Float16>(layout, packet);
    default:
      return bias_grad_kernel<Float32>(layout, packet);
  }
}

}  // namespace cuda
}  // namespace dpk
