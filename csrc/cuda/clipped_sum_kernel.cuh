// Loop of clipped_sum_: the integer sum of the clipped rows.
#pragma once

#include "cuda/device.cuh"

namespace dpk {
namespace cuda {

constexpr int kSumThreads = 128;
constexpr int kSumColumns = 4;  // of one thread
// Rows in flight a thread; with several groups a row also takes a factor for each column, and registers for those.
constexpr int kSumRows = 8;
constexpr int kSumRowsGrouped = 4;

struct SumArguments {
  int64_t* total;           // [P]
  const float* rows;        // [B, P]
  int64_t stride;           // of a row, in elements
  const int64_t* offsets;   // [L + 1]
  const double* factors;    // [B, L]
  int64_t batch, columns, groups;  // B, P, L
};

// The last group that starts at or before the column: empty groups own nothing.
__device__ inline int64_t group_of(const int64_t* offsets, int64_t groups, int64_t column) {
  int64_t low = 0, high = groups;  // offsets[low] <= column < offsets[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle] <= column) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline int64_t rounded(float value, double factor) {
  // A factor of zero selects the value away, whatever it holds. Compiled without contraction: two roundings.
  return factor == 0.0 ? 0 : __double2ll_rd(double{value} * factor + 0.5);
}

// total [P] int64 += sum over rows of floor(row * factor + 0.5). A block owns 512 columns, a thread four of them, and
// walks down the rows, kRows in flight; no two threads write one element, and integers add up exactly in any order.
// With kCount = 4 a thread's columns are one packet (rows start on 16 bytes); with 1 they lie 128 apart, so that
// neighbouring threads read neighbouring elements whatever the alignment.
// Example: P = 300,000: 586 blocks, each reads 2 KiB of every row.
template <int kCount, bool kOneGroup>
__global__ void __launch_bounds__(kSumThreads) clipped_sum_kernel(const SumArguments a) {
  constexpr int kPackets = kSumColumns / kCount;
  constexpr int kRows = kOneGroup ? kSumRows : kSumRowsGrouped;
  const int64_t first = int64_t{blockIdx.x} * kSumThreads * kSumColumns + int64_t{threadIdx.x} * kCount;
  constexpr int64_t apart = int64_t{kSumThreads} * kCount;

  int64_t sum[kSumColumns] = {};
  int64_t group[kSumColumns] = {};
  bool inside[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) inside[k] = first + k * apart < a.columns;
  if (!kOneGroup) {
#pragma unroll
    for (int c = 0; c < kSumColumns; ++c) {
      const int64_t column = first + c / kCount * apart + c % kCount;
      if (inside[c / kCount]) group[c] = group_of(a.offsets, a.groups, column);
    }
  }
  for (int64_t b = 0; b < a.batch; b += kRows) {
    Packet<float, kCount> packet[kRows][kPackets] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (b + r < a.batch && inside[k]) {
          packet[r][k] = load_packet<float, kCount>(a.rows + (b + r) * a.stride + first + k * apart);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (b + r < a.batch) {
        const double* factors = a.factors + (b + r) * a.groups;
        const double one = kOneGroup ? factors[0] : 0.0;
#pragma unroll
        for (int c = 0; c < kSumColumns; ++c) {
          sum[c] += rounded(packet[r][c / kCount].value[c % kCount], kOneGroup ? one : factors[group[c]]);
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    if (!inside[k]) continue;
    int64_t* to = a.total + first + k * apart;
    if constexpr (kCount == 4) {
      auto* pairs = reinterpret_cast<Packet<int64_t, 2>*>(to);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Packet<int64_t, 2> pair = pairs[h];
        pair.value[0] += sum[2 * h];
        pair.value[1] += sum[2 * h + 1];
        pairs[h] = pair;
      }
    } else {
      *to += sum[k];
    }
  }
}

// With packets where rows and total start on 16 bytes and no packet is cut off.
inline auto clipped_sum_kernel_for(const SumArguments& a) -> void (*)(SumArguments) {
  const bool packets =
      a.columns % 4 == 0 && (a.batch == 1 || a.stride % 4 == 0) && aligned(a.rows, 16) && aligned(a.total, 16);
  if (packets) return a.groups == 1 ? clipped_sum_kernel<4, true> : clipped_sum_kernel<4, false>;
  return a.groups == 1 ? clipped_sum_kernel<1, true> : clipped_sum_kernel<1, false>;
}

inline int64_t blocks_of(const SumArguments& a) { return divide_up(a.columns, kSumThreads * kSumColumns); }

}  // namespace cuda
}  // namespace dpk
