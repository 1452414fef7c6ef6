// Launch planning: which loop serves a tensor, and how it is cut. Pure C++: no torch, no threads, no pointers.
// A plan depends on shapes and strides alone, never on the number of threads, so that results do not either.
#pragma once

#include <cstdint>

namespace dpk {

enum class Layout : int { features_last, channels_first, strided };

struct BiasGradPlan {
  Layout layout;
  int64_t tile;   // columns of one work item; the last of a sample has up to 15 more, never a few alone
  int64_t tiles;  // work items of one sample
  int64_t grain;  // least number of work items for one thread
};

// The widest tile: its sums stay in the first-level cache. A kernel takes up to 15 columns more.
constexpr int64_t kMaxTile = 1024;
// Below this many bytes for one thread, waking another costs more than it brings.
constexpr int64_t kBytesPerThread = 1 << 16;

// grad [batch, steps, features] with strides in elements; the sum runs over steps.
BiasGradPlan plan_bias_grad(int64_t batch, int64_t steps, int64_t features, int64_t stride_steps,
                            int64_t stride_features, int64_t item_bytes);

// Least number of work items for one thread when each item touches item_bytes.
int64_t plan_grain(int64_t item_bytes);

}  // namespace dpk
