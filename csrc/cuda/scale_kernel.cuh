// Loops of bit_scale, activation_grad, slope_scale, level_scale and affine_grad: a gradient times what was kept of the
// forward pass, and in the same visit its per-sample sum, cut and folded as bias_grad's.
#pragma once

#include <type_traits>

#include "cuda/activation.cuh"
#include "cuda/reduce.cuh"

namespace dpk {
namespace cuda {

// Launch bounds say "one block" an SM at least: without it ptxas may aim at one more than fits, and spill.
constexpr int kScaleUnroll = 2;  // packets in flight a thread, and as much again of what was kept

struct ScaleArguments {
  BiasGradArguments sums;  // grad and its cut; out is not written unless `sum`
  void* dx;                // as grad
  const void* kept;        // bits, x, codes or planes
  const float* table;      // levels [8] or factors [p]
  int64_t count;           // elements of grad
  float on, off;           // of bits
  int kind;                // of activations
  bool sum;
};

// What a gradient is multiplied by. load: what was kept of kCount elements from index `at` on, a multiple of kCount.
struct Bits {
  static constexpr bool kSumsGrad = false;
  template <class Element, int kCount>
  __device__ static uint32_t load(const ScaleArguments& a, int64_t at) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(a.kept)[at / 8]) >> (at % 8);
  }
  __device__ static float apply(const ScaleArguments& a, uint32_t kept, float grad, int i, float) {
    const float off = a.off != 0.0f ? grad * a.off : 0.0f;  // 0 selects 0, whatever grad holds
    return kept >> i & 1u ? grad * a.on : off;
  }
};

struct Activation {
  static constexpr bool kSumsGrad = false;
  template <class Element, int kCount>
  __device__ static Packet<Element, kCount> load(const ScaleArguments& a, int64_t at) {
    return load_packet<Element, kCount>(static_cast<const Element*>(a.kept) + at);
  }
  template <class Element, int kCount>
  __device__ static float apply(const ScaleArguments& a, const Packet<Element, kCount>& kept, float grad, int i,
                                float) {
    return grad * derivative(to_float(kept.value[i]), a.kind);
  }
};

template <int kCount>
struct CodeBytes {
  Packet<uint8_t, kCount> of[3];  // low byte first
};

struct Codes {
  static constexpr bool kSumsGrad = false;
  template <class Element, int kCount>
  __device__ static CodeBytes<kCount> load(const ScaleArguments& a, int64_t at) {
    CodeBytes<kCount> bytes;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      bytes.of[i] = load_packet<uint8_t, kCount>(static_cast<const uint8_t*>(a.kept) + i * a.count + at);
    }
    return bytes;
  }
  template <int kCount>
  __device__ static float apply(const ScaleArguments&, const CodeBytes<kCount>& kept, float grad, int i, float) {
    const int code = kept.of[0].value[i] | kept.of[1].value[i] << 8 | kept.of[2].value[i] << 16;
    return grad * (static_cast<float>(code) * (1.0f / kSlopeSteps) - 0.5f);  // exact but for the product
  }
};

struct PlaneBits {
  uint32_t of[3];
};

struct Levels {
  static constexpr bool kSumsGrad = false;
  template <class Element, int kCount>
  __device__ static PlaneBits load(const ScaleArguments& a, int64_t at) {
    const int64_t stride = (a.count + 7) / 8;
    const uint8_t* from = static_cast<const uint8_t*>(a.kept) + at / 8;
    const int place = static_cast<int>(at % 8);
    return {{uint32_t{from[0]} >> place, uint32_t{from[stride]} >> place, uint32_t{from[2 * stride]} >> place}};
  }
  __device__ static float apply(const ScaleArguments& a, const PlaneBits& kept, float grad, int i, float) {
    return grad * a.table[(kept.of[0] >> i & 1u) | (kept.of[1] >> i & 1u) << 1 | (kept.of[2] >> i & 1u) << 2];
  }
};

struct Columns {
  static constexpr bool kSumsGrad = true;
  template <class Element, int kCount>
  __device__ static int load(const ScaleArguments&, int64_t) {
    return 0;
  }
  __device__ static float apply(const ScaleArguments&, int, float grad, int, float column) { return grad * column; }
};

// One packet: dx, and what of it is summed.
template <class Element, int kCount, class Factor, class Kept>
__device__ inline void scale_packet(const ScaleArguments& a, const Packet<Element, kCount>& grad, const Kept& kept,
                                    int64_t at, const float (&column)[kCount], float (&sum)[kCount]) {
  Packet<Element, kCount> dx;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = to_float(grad.value[i]);
    dx.value[i] = from_float<Element>(Factor::apply(a, kept, value, i, column[i]));
    sum[i] += Factor::kSumsGrad ? value : to_float(dx.value[i]);
  }
  store_packet(static_cast<Element*>(a.dx) + at, dx);
}

// Packets `from`, `from` + `step`, ... , `count` of them at `at`, `at` + `stride`, ...: loads first, then the rest.
template <class Element, int kCount, class Factor>
__device__ inline void scale_run(const ScaleArguments& a, int64_t from, int64_t count, int64_t step, int64_t at,
                                 int64_t stride, const float (&column)[kCount], float (&sum)[kCount]) {
  const Element* grad = static_cast<const Element*>(a.sums.grad);
  for (int64_t k = from; k < count; k += kScaleUnroll * step, at += kScaleUnroll * stride) {
    Packet<Element, kCount> packet[kScaleUnroll] = {};
    decltype(Factor::template load<Element, kCount>(a, at)) kept[kScaleUnroll] = {};
#pragma unroll
    for (int u = 0; u < kScaleUnroll; ++u) {
      if (k + u * step < count) {
        packet[u] = load_packet<Element, kCount>(grad + at + u * stride);
        kept[u] = Factor::template load<Element, kCount>(a, at + u * stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kScaleUnroll; ++u) {
      if (k + u * step < count) {
        scale_packet<Element, kCount, Factor>(a, packet[u], kept[u], at + u * stride, column, sum);
      }
    }
  }
}

// Features last, and elements in a row where nothing is summed. As bias_grad_features_last_kernel: the lanes of a row
// read 128 contiguous bytes of grad and write as many of dx; what was kept lies in the same order, 64 bytes of codes or
// 8 of bits for them. Each thread sums its columns down the chunk.
// Example: bits beside [64, 512, 768] in bfloat16: a packet is 8 columns and one byte of bits; 12 blocks a sample, 16
// packets a thread.
template <class Element, int kCount, class Factor>
__global__ void __launch_bounds__(kReduceThreads, 1) scale_features_last_kernel(const ScaleArguments a) {
  const Part part = part_of_block(a.sums);
  const int thread = threadIdx.x, lane = thread % a.sums.lanes;
  const int row = thread / a.sums.lanes, rows = kReduceThreads / a.sums.lanes;
  const int64_t at = (part.tile * a.sums.lanes + lane) * kCount;

  float sum[kCount] = {}, column[kCount] = {};
  if (at < a.sums.features) {
    if (Factor::kSumsGrad) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) column[i] = a.table[at + i];
    }
    const int64_t first = part.sample * a.sums.stride_batch + (part.first + row) * a.sums.stride_steps +
                          at * (kCount == 1 ? a.sums.stride_features : 1);
    scale_run<Element, kCount, Factor>(a, row, part.count, rows, first, rows * a.sums.stride_steps, column, sum);
  }
  if (a.sum) fold_rows<kCount>(a.sums, part, at, sum);
}

// Channels first, as bias_grad_channels_first_kernel: neighbouring lanes take neighbouring packets of one channel.
// Example: bits beside 256 channels of 56 x 56 in bfloat16: 392 packets and bytes a channel, 64 lanes with 6 or 7 each.
template <class Element, int kCount, class Factor>
__global__ void __launch_bounds__(kReduceThreads, 1) scale_channels_first_kernel(const ScaleArguments a) {
  const Part part = part_of_block(a.sums);
  const int thread = threadIdx.x, lane = thread % a.sums.lanes;
  const int64_t channel = part.tile * (kReduceThreads / a.sums.lanes) + thread / a.sums.lanes;

  float sum[kCount] = {}, column[kCount] = {};
  if (channel < a.sums.features) {
    if (Factor::kSumsGrad) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) column[i] = a.table[channel];
    }
    const int64_t first = part.sample * a.sums.stride_batch + channel * a.sums.stride_features + part.first +
                          int64_t{lane} * kCount;
    scale_run<Element, kCount, Factor>(a, lane, part.count / kCount, a.sums.lanes, first,
                                       int64_t{a.sums.lanes} * kCount, column, sum);
  }
  if (a.sum) fold_lanes<kCount>(a.sums, part, channel, sum);
}

using ScaleKernel = void (*)(ScaleArguments);

template <class Factor, class Element, int kCount>
ScaleKernel scale_kernel(Layout layout) {
  return layout == Layout::channels_first ? scale_channels_first_kernel<Element, kCount, Factor>
                                          : scale_features_last_kernel<Element, kCount, Factor>;
}

// Packets of 16 bytes, of 8 (14 x 14 images of 16 bits), and of one element.
template <class Factor, class Element>
ScaleKernel scale_kernel(Layout layout, int packet) {
  if constexpr (sizeof(Element) == 2) {
    if (packet == 8) return scale_kernel<Factor, Element, 8>(layout);
  }
  return packet == 4 ? scale_kernel<Factor, Element, 4>(layout) : scale_kernel<Factor, Element, 1>(layout);
}

// type: 0 float32, 1 bfloat16, 2 float16; of codes float32 only
template <class Factor>
ScaleKernel scale_kernel(int type, Layout layout, int packet) {
  if constexpr (!std::is_same_v<Factor, Codes>) {
    if (type == 1) return scale_kernel<Factor, BFloat16>(layout, packet);
    if (type == 2) return scale_kernel<Factor, Float16>(layout, packet);
  }
  return scale_kernel<Factor, Float32>(layout, packet);
}

// What the ops and the tests launch.
struct ScaleLaunch {
  ScaleArguments arguments;
  Layout layout;
  int packet;
  int64_t blocks, batch, steps, features, splits;
};

// grad [B, R, C] without gaps. address: all that must be aligned as grad must be, or-ed; what has fewer bytes an
// element is scaled up before. out and what was kept are left to the caller.
inline ScaleLaunch plan_scale(int64_t batch, int64_t length, int64_t width, int reduce, int64_t item_bytes,
                              uint64_t address) {
  BiasGradShape shape{batch, length, width, length * width, width, 1, item_bytes, address};
  if (reduce == 0) {
    const int64_t count = batch * length * width;
    shape = {1, 1, count, count, count, 1, item_bytes, address};
  } else if (reduce == 2) {
    shape = {batch, width, length, length * width, 1, width, item_bytes, address};
  }
  BiasGradPlan plan = plan_bias_grad(shape);
  if (plan.packet == 2) {
    shape.address |= static_cast<uint64_t>(item_bytes);
    plan = plan_bias_grad(shape);
  }
  ScaleLaunch made{};
  BiasGradArguments& sums = made.arguments.sums;
  sums.steps = shape.steps;
  sums.features = shape.features;
  sums.stride_batch = shape.stride_batch;
  sums.stride_steps = shape.stride_steps;
  sums.stride_features = shape.stride_features;
  sums.stride_out_batch = plan.splits * shape.features;
  sums.stride_out_split = shape.features;
  sums.chunk = plan.chunk;
  sums.splits = plan.splits;
  sums.tiles = plan.tiles;
  sums.lanes = plan.lanes;
  made.arguments.count = batch * length * width;
  made.arguments.sum = reduce != 0;
  made.layout = plan.layout;
  made.packet = plan.packet;
  made.batch = shape.batch;
  made.steps = shape.steps;
  made.features = shape.features;
  made.splits = plan.splits;
  made.blocks = shape.batch * plan.splits * plan.tiles;
  return made;
}

}  // namespace cuda
}  // namespace dpk
