// Loops of layer_norm_grad, group_norm_grad and quantize_norm.
#pragma once

#include <cmath>

#include "cuda/device.cuh"

namespace dpk {
namespace cuda {

constexpr int kNormGradThreads = 256;
constexpr int kWidestTeam = 512;               // threads of one row of layer_norm_grad
// Columns that a thread keeps the sums of, in packets of kPacket; single elements take an address and a test each.
template <int kPacket>
constexpr int kOwnColumnsOf = kPacket == 1 ? 8 : 16;
constexpr int64_t kRowsOfBlock = 32;           // at least: partial sums are then 2% of what is read and written
constexpr int64_t kBlocksOfSample = 64;        // worth having where rows are many
constexpr int64_t kLongestChain = 128;         // float32 additions to one accumulator

struct NormArguments {
  const void* grad;            // [B, R, C] or [B, G, K, S]
  const void* x;               // the same, of grad's type or int8
  const float *shift, *scale, *rstd;  // of each row or group; shift may be null
  const float* weight;         // [C] or [G, K], or null
  void* dx;
  float* out;                  // [B, splits, C] or [B, G, K], or null: not wanted
  int64_t length, width;       // R, C or K, S
  int64_t chunk, splits;       // rows of a block, blocks of a sample; G, 1
  int threads, team;           // of a block, of a row or channel
};

__device__ inline float to_float(int8_t value) { return static_cast<float>(value); }

// n = (x - shift) * scale and g = weight * grad: dx = rstd * (g - mean(g) - n * mean(g * n)).
struct NormStatistics {
  float shift, scale, rstd;
};

__device__ inline NormStatistics statistics(const NormArguments& a, int64_t i) {
  return {a.shift != nullptr ? a.shift[i] : 0.0f, a.scale[i], a.rstd[i]};
}

// kCount neighbouring weights, or ones.
template <int kCount>
__device__ inline void load_weights(const float* from, float (&weight)[kCount]) {
  constexpr int kPart = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int k = 0; k < kCount; k += kPart) {
    Packet<float, kPart> packet;
    if (from != nullptr) packet = load_packet<float, kPart>(from + k);
#pragma unroll
    for (int i = 0; i < kPart; ++i) weight[k + i] = from != nullptr ? packet.value[i] : 1.0f;
  }
}

template <class Element, class X, int kCount>
__device__ inline Packet<Element, kCount> norm_packet(const Packet<Element, kCount>& grad, const Packet<X, kCount>& x,
                                                      const float (&weight)[kCount], const NormStatistics& row,
                                                      float mean, float along) {
  Packet<Element, kCount> dx;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float n = (to_float(x.value[i]) - row.shift) * row.scale;
    dx.value[i] = from_float<Element>(row.rstd * (to_float(grad.value[i]) * weight[i] - mean - n * along));
  }
  return dx;
}

// A team of threads serves a row, the teams of a block neighbouring rows, until the block's chunk of one sample is
// done. A thread keeps its packets of grad and x between the two uses, so that both are read once, and adds up grad
// column by column on the way; at the end the teams' sums meet in shared memory, halving their number each time. Both
// means of a row meet by shuffles inside a warp, then through shared memory, whose two halves take turns: one barrier
// a row. Neighbouring threads read neighbouring packets.
// Example: C = 768 in bfloat16: 96 packets of 8, a team of 64 with one or two each, four rows at a time, 32 a block.
// Launch bounds as in scale_kernel.cuh.
template <class Element, class X, int kCount>
__global__ void __launch_bounds__(kWidestTeam, 1) layer_norm_grad_kernel(const NormArguments a) {
  constexpr int kOwnColumns = kOwnColumnsOf<kCount>, kOwn = kOwnColumns / kCount;
  __shared__ float of_warp[2][2][kWidestTeam / kWarp];
  __shared__ float shared[kOwnColumns][kNormGradThreads];
  const int64_t split = blockIdx.x % a.splits, sample = blockIdx.x / a.splits, first = split * a.chunk;
  const int64_t count = a.length - first < a.chunk ? a.length - first : a.chunk;
  const int thread = threadIdx.x, lane = thread % a.team, team = thread / a.team, teams = a.threads / a.team;
  const float inverse = 1.0f / static_cast<float>(a.width);

  float sum[kOwn][kCount] = {};
  int turn = 0;
  for (int64_t r = 0; r < count; r += teams, turn ^= 1) {
    const bool live = r + team < count;
    const int64_t row = sample * a.length + first + (live ? r + team : 0);
    const NormStatistics of_row = statistics(a, row);
    const Element* grad_row = static_cast<const Element*>(a.grad) + row * a.width;
    const X* x_row = static_cast<const X*>(a.x) + row * a.width;
    Packet<Element, kCount> grad[kOwn] = {};
    Packet<X, kCount> x[kOwn] = {};
    float mean = 0.0f, along = 0.0f;
#pragma unroll
    for (int p = 0; p < kOwn; ++p) {
      const int64_t column = (int64_t{p} * a.team + lane) * kCount;
      if (live && column < a.width) {
        grad[p] = load_packet<Element, kCount>(grad_row + column);
        x[p] = load_packet<X, kCount>(x_row + column);
      }
    }
#pragma unroll
    for (int p = 0; p < kOwn; ++p) {
      const int64_t column = (int64_t{p} * a.team + lane) * kCount;
      if (live && column < a.width) {
        float weight[kCount], g[kCount], product[kCount];
        load_weights(a.weight != nullptr ? a.weight + column : nullptr, weight);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float value = to_float(grad[p].value[i]);
          sum[p][i] += value;
          g[i] = value * weight[i];
          product[i] = g[i] * ((to_float(x[p].value[i]) - of_row.shift) * of_row.scale);
        }
        mean += sum_of(g);
        along += sum_of(product);
      }
    }
    mean = sum_of_lanes(mean, a.team < kWarp ? a.team : kWarp);
    along = sum_of_lanes(along, a.team < kWarp ? a.team : kWarp);
    if (a.team > kWarp) {
      const int warp = thread / kWarp, warps = a.team / kWarp;
      if (thread % kWarp == 0) {
        of_warp[turn][0][warp] = mean;
        of_warp[turn][1][warp] = along;
      }
      __syncthreads();
      mean = along = 0.0f;
      for (int w = team * warps; w < (team + 1) * warps; ++w) {
        mean += of_warp[turn][0][w];
        along += of_warp[turn][1][w];
      }
    }
    mean *= inverse;
    along *= inverse;
#pragma unroll
    for (int p = 0; p < kOwn; ++p) {
      const int64_t column = (int64_t{p} * a.team + lane) * kCount;
      if (live && column < a.width) {
        float weight[kCount];
        load_weights(a.weight != nullptr ? a.weight + column : nullptr, weight);
        store_packet(static_cast<Element*>(a.dx) + row * a.width + column,
                     norm_packet(grad[p], x[p], weight, of_row, mean, along));
      }
    }
  }
  if (a.out == nullptr) return;

  if (teams > 1) {
#pragma unroll
    for (int i = 0; i < kOwnColumns; ++i) shared[i][thread] = sum[i / kCount][i % kCount];
    for (int half = kNormGradThreads / 2; half >= a.team; half /= 2) {
      __syncthreads();
      if (thread < half) {
#pragma unroll
        for (int i = 0; i < kOwnColumns; ++i) shared[i][thread] += shared[i][thread + half];
      }
    }
  }
  if (team > 0) return;
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int64_t column = (int64_t{i / kCount} * a.team + lane) * kCount + i % kCount;
    if (column < a.width) {
      a.out[(sample * a.splits + split) * a.width + column] = teams > 1 ? shared[i][thread]
                                                                        : sum[i / kCount][i % kCount];
    }
  }
}

// A block serves one group of one sample, in two visits; the second finds what the first left in the caches. A team of
// lanes shares a channel and reads its positions a packet each, side by side. The sums of a channel's grad (its row)
// and of its product with the normalised input are float32 along at most kLongestChain packets, then float64; they
// meet by shuffles and shared memory, and the channels', times weight, give the group's means.
// Example: 8 channels of 28 x 28 in bfloat16: 98 packets, 32 lanes with three or four each, all channels at once.
template <class Element, class X, int kCount>
__global__ void __launch_bounds__(kNormGradThreads) group_norm_grad_kernel(const NormArguments a) {
  __shared__ double of_warp[2][kNormGradThreads / kWarp];
  const int64_t group = blockIdx.x, channels = a.length, packets = a.width / kCount;
  const int thread = threadIdx.x, lane = thread % a.team, slot = thread / a.team, slots = kNormGradThreads / a.team;
  const int warp = thread / kWarp, warps = a.team / kWarp;
  const NormStatistics of_group = statistics(a, group);
  const float* weights = a.weight != nullptr ? a.weight + group % a.chunk * channels : nullptr;
  const Element* grad = static_cast<const Element*>(a.grad) + group * channels * a.width;
  const X* x = static_cast<const X*>(a.x) + group * channels * a.width;

  double mean = 0.0, along = 0.0;
  for (int64_t k0 = 0; k0 < channels; k0 += slots) {
    const int64_t k = k0 + slot;
    double sum = 0.0, product = 0.0;
    if (k < channels) {
      for (int64_t q = lane; q < packets;) {
        float part = 0.0f, part_product = 0.0f;
        const int64_t end = q + kLongestChain * a.team < packets ? q + kLongestChain * a.team : packets;
        for (; q < end; q += a.team) {
          const auto g = load_packet<Element, kCount>(grad + k * a.width + q * kCount);
          const auto n = load_packet<X, kCount>(x + k * a.width + q * kCount);
          float value[kCount], times[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            value[i] = to_float(g.value[i]);
            times[i] = value[i] * ((to_float(n.value[i]) - of_group.shift) * of_group.scale);
          }
          part += sum_of(value);
          part_product += sum_of(times);
        }
        sum += part;
        product += part_product;
      }
    }
    sum = sum_of_lanes(sum, a.team < kWarp ? a.team : kWarp);
    product = sum_of_lanes(product, a.team < kWarp ? a.team : kWarp);
    if (a.team > kWarp) {
      __syncthreads();  // the sums of the channels before were read
      if (thread % kWarp == 0) {
        of_warp[0][warp] = sum;
        of_warp[1][warp] = product;
      }
      __syncthreads();
      if (lane == 0) {
        for (int w = 1; w < warps; ++w) {
          sum += of_warp[0][warp + w];
          product += of_warp[1][warp + w];
        }
      }
    }
    if (lane == 0 && k < channels) {
      if (a.out != nullptr) a.out[group * channels + k] = static_cast<float>(sum);
      const double weight = weights != nullptr ? weights[k] : 1.0f;
      mean += weight * sum;
      along += weight * product;
    }
  }
  __syncthreads();
  mean = sum_of_lanes(mean, kWarp);
  along = sum_of_lanes(along, kWarp);
  if (thread % kWarp == 0) {
    of_warp[0][warp] = mean;
    of_warp[1][warp] = along;
  }
  __syncthreads();
  mean = along = 0.0;
  for (int w = 0; w < kNormGradThreads / kWarp; ++w) {
    mean += of_warp[0][w];
    along += of_warp[1][w];
  }
  const double inverse = 1.0 / (static_cast<double>(channels) * static_cast<double>(a.width));
  const float whole_mean = static_cast<float>(mean * inverse), whole_along = static_cast<float>(along * inverse);

  for (int64_t k = slot; k < channels; k += slots) {
    float weight[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) weight[i] = weights != nullptr ? weights[k] : 1.0f;
    Element* dx = static_cast<Element*>(a.dx) + (group * channels + k) * a.width;
    for (int64_t q = lane; q < packets; q += a.team) {
      const auto g = load_packet<Element, kCount>(grad + k * a.width + q * kCount);
      const auto n = load_packet<X, kCount>(x + k * a.width + q * kCount);
      store_packet(dx + q * kCount, norm_packet(g, n, weight, of_group, whole_mean, whole_along));
    }
  }
}

struct QuantizeArguments {
  const void* x;             // [M, N]
  const float *mean, *rstd;  // [M]
  int8_t* codes;             // [M, N]
  float* scale;              // [M]
  int64_t count, width;      // M, N
  int team;
};

// A team of threads serves a row: its largest value in the first visit (infinite where one is not a number), its codes
// in the second, from the caches.
// Example: N = 768 in bfloat16: 96 packets, 32 lanes with three each, eight rows a block.
template <class Element, int kCount>
__global__ void __launch_bounds__(kNormGradThreads) quantize_norm_kernel(const QuantizeArguments a) {
  __shared__ float of_warp[kNormGradThreads / kWarp];
  const int thread = threadIdx.x, lane = thread % a.team, warps = a.team / kWarp, warp = thread / kWarp;
  const int64_t row = blockIdx.x * int64_t{kNormGradThreads / a.team} + thread / a.team, packets = a.width / kCount;
  const bool live = row < a.count;
  const Element* x = static_cast<const Element*>(a.x) + row * a.width;
  const float mean = live ? a.mean[row] : 0.0f, rstd = live ? a.rstd[row] : 0.0f;

  float largest = 0.0f;
  if (live) {
    for (int64_t q = lane; q < packets; q += a.team) {
      const auto packet = load_packet<Element, kCount>(x + q * kCount);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float value = fabsf((to_float(packet.value[i]) - mean) * rstd);
        largest = value <= largest ? largest : value < INFINITY ? value : INFINITY;
      }
    }
  }
  for (int distance = (a.team < kWarp ? a.team : kWarp) / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, distance);
    largest = other > largest ? other : largest;
  }
  if (a.team > kWarp) {
    if (thread % kWarp == 0) of_warp[warp] = largest;
    __syncthreads();
    const int first = warp / warps * warps;
    for (int w = first; w < first + warps; ++w) largest = of_warp[w] > largest ? of_warp[w] : largest;
  }
  if (!live) return;
  const float scale = largest > 0.0f && largest < INFINITY ? largest / 127.0f : 1.0f;
  if (lane == 0) a.scale[row] = scale;
  for (int64_t q = lane; q < packets; q += a.team) {
    const auto packet = load_packet<Element, kCount>(x + q * kCount);
    Packet<int8_t, kCount> codes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float code = floorf((to_float(packet.value[i]) - mean) * rstd / scale + 0.5f);
      codes.value[i] = static_cast<int8_t>(code > 127.0f ? 127 : code < -127.0f ? -127 : code == code ? int(code) : 0);
    }
    store_packet(a.codes + row * a.width + q * kCount, codes);
  }
}

}  // namespace cuda
}  // namespace dpk
