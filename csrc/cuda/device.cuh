// What the kernels share: element types, packets of up to 16 bytes, sums across threads. Included by the .cu files and,
// through csrc/tests/cuda_on_cpu.h, by the tests that run the kernels without a GPU: only what both offer is used.
#pragma once

#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dpk {
namespace cuda {

constexpr int kWarp = 32;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Elements as they lie in memory. Arithmetic is float32 from the load on.
struct Float32 {
  float bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float to_float(Float32 value) { return value.bits; }
__device__ inline float to_float(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ inline float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// One rounding, to nearest even.
template <class Element>
__device__ inline Element from_float(float value);
template <>
__device__ inline Float32 from_float<Float32>(float value) {
  return {value};
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Float16 from_float<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// kCount neighbouring elements, loaded and stored as one access; at most 16 bytes.
template <class Element, int kCount>
struct alignas(sizeof(Element) * kCount) Packet {
  static_assert(sizeof(Element) * kCount <= 16 && (kCount & (kCount - 1)) == 0);
  Element value[kCount];
};

template <class Element, int kCount>
__device__ inline Packet<Element, kCount> load_packet(const Element* from) {
  return *reinterpret_cast<const Packet<Element, kCount>*>(from);
}

template <class Element, int kCount>
__device__ inline void store_packet(Element* to, const Packet<Element, kCount>& packet) {
  *reinterpret_cast<Packet<Element, kCount>*>(to) = packet;
}

// Neighbours first: chains of three additions for a packet of eight.
template <int kCount>
__device__ inline float sum_of(const float (&value)[kCount]) {
  float sum[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = value[i];
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// Sum over the `lanes` neighbouring lanes (a power of two up to 32) that a lane belongs to; each of them gets it.
template <class Number>
__device__ inline Number sum_of_lanes(Number value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace cuda
}  // namespace dpk
