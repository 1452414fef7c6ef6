// Which kernel of norm_grad_kernel.cuh serves a tensor, and how the work is cut: by shape and address of one sample.
#pragma once

#include <algorithm>

#include "cuda/norm_grad_kernel.cuh"

namespace dpk {
namespace cuda {

using NormKernel = void (*)(NormArguments);
using QuantizeKernel = void (*)(QuantizeArguments);

inline int64_t power_of_two_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// Elements of a packet: 16 bytes of grad where everything allows it, else one.
inline int norm_packet_of(const NormArguments& a, int64_t contiguous, int item_bytes, int x_bytes) {
  const int packet = 16 / item_bytes;
  const bool whole = contiguous % packet == 0 && aligned(a.grad, 16) && aligned(a.dx, 16) &&
                     aligned(a.x, int64_t{packet} * x_bytes);
  return whole ? packet : 1;
}

// Fills in the cut of layer_norm_grad; returns the elements of a packet, or 0 where a row is too wide for a block.
inline int plan_layer_norm(NormArguments& a, int item_bytes, int x_bytes) {
  const bool plain_weight = a.weight == nullptr || aligned(a.weight, 16);
  const int packet = plain_weight ? norm_packet_of(a, a.width, item_bytes, x_bytes) : 1;
  const int own = packet == 1 ? kOwnColumnsOf<1> : kOwnColumnsOf<8>;
  if (a.width > int64_t{kWidestTeam} * own) return 0;
  a.team = static_cast<int>(power_of_two_from(divide_up(a.width, a.width < own ? packet : own)));
  a.threads = std::max(a.team, kNormGradThreads);
  const int64_t teams = a.threads / a.team;
  const int64_t rows = std::max(divide_up(a.length, kBlocksOfSample), kRowsOfBlock);
  a.chunk = divide_up(std::min(rows, kLongestChain * teams), teams) * teams;
  a.splits = divide_up(a.length, a.chunk);
  return packet;
}

// The same of group_norm_grad, where length and width are K and S.
inline int plan_group_norm(NormArguments& a, int64_t groups, int item_bytes, int x_bytes) {
  const int packet = norm_packet_of(a, a.width, item_bytes, x_bytes);
  a.team = static_cast<int>(std::min<int64_t>(kNormGradThreads, power_of_two_from(divide_up(a.width / packet, 4))));
  a.threads = kNormGradThreads;
  a.chunk = groups;
  a.splits = 1;
  return packet;
}

template <class Element, class X>
NormKernel norm_kernel(bool layer, int packet) {
  constexpr int kWhole = 16 / sizeof(Element);
  if (layer) return packet == 1 ? layer_norm_grad_kernel<Element, X, 1> : layer_norm_grad_kernel<Element, X, kWhole>;
  return packet == 1 ? group_norm_grad_kernel<Element, X, 1> : group_norm_grad_kernel<Element, X, kWhole>;
}

template <class Element>
NormKernel norm_kernel(bool layer, bool packed, int packet) {
  return packed ? norm_kernel<Element, int8_t>(layer, packet) : norm_kernel<Element, Element>(layer, packet);
}

// type: 0 float32, 1 bfloat16, 2 float16; packed: x is int8
inline NormKernel norm_kernel(bool layer, int type, bool packed, int packet) {
  switch (type) {
    case 1:
      return norm_kernel<BFloat16>(layer, packed, packet);
    case 2:
      return norm_kernel<Float16>(layer, packed, packet);
    default:
      return norm_kernel<Float32>(layer, packed, packet);
  }
}

// Fills in the team.
inline QuantizeKernel plan_quantize_norm(QuantizeArguments& a, int type) {
  const int packet = type == 0 ? 4 : 8;
  const bool whole = a.width % packet == 0 && aligned(a.x, 16) && aligned(a.codes, packet);
  const int64_t packets = whole ? a.width / packet : a.width;
  a.team = static_cast<int>(std::min<int64_t>(kNormGradThreads, power_of_two_from(divide_up(packets, 4))));
  switch (type) {
    case 1:
      return whole ? quantize_norm_kernel<BFloat16, 8> : quantize_norm_kernel<BFloat16, 1>;
    case 2:
      return whole ? quantize_norm_kernel<Float16, 8> : quantize_norm_kernel<Float16, 1>;
    default:
      return whole ? quantize_norm_kernel<Float32, 4> : quantize_norm_kernel<Float32, 1>;
  }
}

inline int64_t blocks_of(const QuantizeArguments& a) { return divide_up(a.count, kNormGradThreads / a.team); }

}  // namespace cuda
}  // namespace dpk
