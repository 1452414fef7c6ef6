// Loops of pack_bits, clamp_pack, level_pack and slope_pack. Bits are in memory order: element i is bit i % 8 of byte
// i / 8, unused bits are 0.
#pragma once

#include "cuda/activation.cuh"

namespace dpk {
namespace cuda {

constexpr int kPackThreads = 256;

struct PackArguments {
  const void* x;       // [n]
  void* y;             // [n], of clamp_pack and slope_pack; may be x
  uint8_t* out;        // [ceil(n / 8)], [3, ceil(n / 8)] or [3, n]
  const float* edges;  // [7]
  int64_t count;       // n
  float low, high, slope;
  int kind;
};

// Eight neighbours as float32, or 0 beyond the last: in packets of kCount, whole where all eight are there.
template <class Element, int kCount>
__device__ inline void load_eight(const Element* from, int64_t left, float (&value)[8]) {
  if (left >= 8) {
#pragma unroll
    for (int k = 0; k < 8; k += kCount) {
      const auto packet = load_packet<Element, kCount>(from + k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[k + i] = to_float(packet.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = i < left ? to_float(from[i]) : 0.0f;
  }
}

// A thread makes one byte of eight neighbouring bools. A warp reads 256 contiguous bytes and writes 32.
// Example: 1, 0, 1, 1, 0, 0, 0, 0 becomes 0x0d.
template <int kCount>
__global__ void __launch_bounds__(kPackThreads) pack_bits_kernel(const PackArguments a) {
  const int64_t byte = int64_t{blockIdx.x} * kPackThreads + threadIdx.x, left = a.count - 8 * byte;
  if (left <= 0) return;
  const uint8_t* from = static_cast<const uint8_t*>(a.x) + 8 * byte;
  unsigned bits = 0;
  if (left >= 8) {
#pragma unroll
    for (int k = 0; k < 8; k += kCount) {
      const auto packet = load_packet<uint8_t, kCount>(from + k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits |= (packet.value[i] != 0 ? 1u : 0u) << (k + i);
    }
  } else {
    for (int i = 0; i < left; ++i) bits |= (from[i] != 0 ? 1u : 0u) << i;
  }
  a.out[byte] = static_cast<uint8_t>(bits);
}

// A thread clamps eight neighbours and makes the byte that says which were strictly between. Of 16 bits an element they
// are one packet, so that a warp reads and writes 512 contiguous bytes. Comparisons with a NaN are false: a NaN element
// lies between and stays, a NaN `high` limits nothing.
// Example: ReLU of -1, 2, 0, 3 and four more that are positive: 0, 2, 0, 3, ... and 0xfa.
template <class Element, int kCount>
__global__ void __launch_bounds__(kPackThreads) clamp_pack_kernel(const PackArguments a) {
  const int64_t byte = int64_t{blockIdx.x} * kPackThreads + threadIdx.x, left = a.count - 8 * byte;
  if (left <= 0) return;
  float value[8];
  load_eight<Element, kCount>(static_cast<const Element*>(a.x) + 8 * byte, left, value);
  Element* to = static_cast<Element*>(a.y) + 8 * byte;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool below = value[i] <= a.low, above = value[i] >= a.high;
    bits |= (below || above || i >= left ? 0u : 1u) << i;
    if (below) value[i] = a.slope != 0.0f ? value[i] * a.slope : a.low;
    if (above) value[i] = a.high;
  }
  if (left >= 8) {
#pragma unroll
    for (int k = 0; k < 8; k += kCount) {
      Packet<Element, kCount> packet;
#pragma unroll
      for (int i = 0; i < kCount; ++i) packet.value[i] = from_float<Element>(value[k + i]);
      store_packet(to + k, packet);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) to[i] = from_float<Element>(value[i]);
    }
  }
  a.out[byte] = static_cast<uint8_t>(bits);
}

// A thread counts the edges below each of eight neighbours, and makes a byte of each of the three planes of the counts.
// Example: edges 1 to 7, elements 0.5, 2.5, 7.5, ...: counts 0, 2, 7; plane 0 begins 0, 0, 1, plane 1 with 0, 1, 1.
template <class Element, int kCount>
__global__ void __launch_bounds__(kPackThreads) level_pack_kernel(const PackArguments a) {
  const int64_t byte = int64_t{blockIdx.x} * kPackThreads + threadIdx.x, left = a.count - 8 * byte;
  if (left <= 0) return;
  float value[8];
  load_eight<Element, kCount>(static_cast<const Element*>(a.x) + 8 * byte, left, value);
  unsigned code[8] = {};
#pragma unroll
  for (int k = 0; k < 7; ++k) {
    const float edge = a.edges[k];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] += value[i] > edge && i < left ? 1u : 0u;
  }
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= (code[i] >> plane & 1u) << i;
    a.out[plane * ((a.count + 7) / 8) + byte] = static_cast<uint8_t>(bits);
  }
}

// A thread evaluates kCount neighbours and writes three bytes of each derivative, a byte a plane: a warp reads and
// writes 512 contiguous bytes of x and y, and 128 of each plane.
// Example: d = 1: 2^23 + 2^22 = 0xc00000: 0, 0 and 192.
template <int kCount>
__global__ void __launch_bounds__(kPackThreads) slope_pack_kernel(const PackArguments a) {
  const int64_t at = (int64_t{blockIdx.x} * kPackThreads + threadIdx.x) * kCount;
  if (at >= a.count) return;
  const auto x = load_packet<float, kCount>(static_cast<const float*>(a.x) + at);
  Packet<float, kCount> y;
  Packet<uint8_t, kCount> code[3];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    y.value[i] = activation(x.value[i], a.kind);
    const uint32_t slope = slope_code(derivative(x.value[i], a.kind));
#pragma unroll
    for (int k = 0; k < 3; ++k) code[k].value[i] = static_cast<uint8_t>(slope >> (8 * k));
  }
  store_packet(static_cast<float*>(a.y) + at, y);
#pragma unroll
  for (int k = 0; k < 3; ++k) store_packet(a.out + k * a.count + at, code[k]);
}

using PackKernel = void (*)(PackArguments);

inline int64_t blocks_of(int64_t count, int each) { return divide_up(count, int64_t{each} * kPackThreads); }

inline PackKernel pack_bits_kernel_for(const PackArguments& a) {
  return aligned(a.x, 8) ? pack_bits_kernel<8> : pack_bits_kernel<1>;
}

// Elements of a thread of slope_pack.
inline int slope_pack_each(const PackArguments& a) {
  return aligned(a.x, 16) && aligned(a.y, 16) && aligned(a.out, 4) && a.count % 4 == 0 ? 4 : 1;
}

inline PackKernel slope_pack_kernel_for(const PackArguments& a) {
  return slope_pack_each(a) == 4 ? slope_pack_kernel<4> : slope_pack_kernel<1>;
}

// type: 0 float32, 1 bfloat16, 2 float16
inline PackKernel clamp_pack_kernel_for(const PackArguments& a, int type) {
  const bool whole = aligned(a.x, 16) && aligned(a.y, 16);
  switch (type) {
    case 1:
      return whole ? clamp_pack_kernel<BFloat16, 8> : clamp_pack_kernel<BFloat16, 1>;
    case 2:
      return whole ? clamp_pack_kernel<Float16, 8> : clamp_pack_kernel<Float16, 1>;
    default:
      return whole ? clamp_pack_kernel<Float32, 4> : clamp_pack_kernel<Float32, 1>;
  }
}

inline PackKernel level_pack_kernel_for(const PackArguments& a, int type) {
  const bool whole = aligned(a.x, 16);
  switch (type) {
    case 1:
      return whole ? level_pack_kernel<BFloat16, 8> : level_pack_kernel<BFloat16, 1>;
    case 2:
      return whole ? level_pack_kernel<Float16, 8> : level_pack_kernel<Float16, 1>;
    default:
      return whole ? level_pack_kernel<Float32, 4> : level_pack_kernel<Float32, 1>;
  }
}

}  // namespace cuda
}  // namespace dpk
