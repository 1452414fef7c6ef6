#include "cuda/launch_plan.h"

#include <algorithm>

namespace dpk {
namespace cuda {

namespace {

constexpr int64_t kThreads = 256;
constexpr int64_t kLine = 128;         // bytes of a memory line: what the lanes of one row read at once
constexpr int64_t kUnsplit = 64;       // loads a thread, up to which one block sums a whole T: a second launch costs more
constexpr int64_t kSplit = 32;         // loads a thread where T is split: 128 KiB a block
constexpr int64_t kLoadsOfLane = 4;    // packets a lane has at least, before more lanes share a channel

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t power_of_two_up(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// The largest packet that divides every extent; strides of dimensions of one element say nothing.
int packet_of(const BiasGradShape& s, int64_t contiguous, int64_t other_size, int64_t other_stride) {
  int64_t packet = 16 / s.item_bytes;
  while (packet > 1 && (contiguous % packet != 0 || (other_size > 1 && other_stride % packet != 0) ||
                        (s.batch > 1 && s.stride_batch % packet != 0) ||
                        s.address % static_cast<uint64_t>(packet * s.item_bytes) != 0)) {
    packet /= 2;
  }
  return static_cast<int>(packet);
}

}  // namespace

BiasGradPlan plan_bias_grad(const BiasGradShape& s) {
  BiasGradPlan plan{};
  // The stride of a dimension of one element is arbitrary: p = 1 is channels first, T = 1 features last.
  if (s.stride_features == 1 && (s.features > 1 || s.stride_steps != 1)) {
    plan.layout = Layout::features_last;
  } else if (s.stride_steps == 1 && s.steps > 1) {
    plan.layout = Layout::channels_first;
  } else {
    plan.layout = s.features == 1 ? Layout::features_last : Layout::strided;
  }

  if (plan.layout == Layout::channels_first) {
    plan.packet = packet_of(s, s.steps, s.features, s.stride_features);
    const int64_t packets = s.steps / plan.packet;
    plan.lanes = static_cast<int>(std::min(kThreads, power_of_two_up(divide_up(packets, kLoadsOfLane * 2))));
    plan.tiles = divide_up(s.features, kThreads / plan.lanes);
    const int64_t once = plan.lanes * int64_t{plan.packet};  // steps of one load of all lanes
    plan.chunk = s.steps <= kUnsplit * once ? s.steps : kSplit * once;
  } else {
    plan.packet = plan.layout == Layout::features_last && s.stride_features == 1
                      ? packet_of(s, s.features, s.steps, s.stride_steps)
                      : 1;
    const int64_t line = kLine / (plan.packet * s.item_bytes);
    plan.lanes = static_cast<int>(std::min(line, power_of_two_up(divide_up(s.features, plan.packet))));
    plan.tiles = divide_up(s.features, int64_t{plan.lanes} * plan.packet);
    const int64_t rows = kThreads / plan.lanes;
    plan.chunk = s.steps <= kUnsplit * rows ? s.steps : kSplit * rows;
  }
  plan.chunk = std::max<int64_t>(plan.chunk, 1);
  plan.splits = std::max<int64_t>(1, divide_up(s.steps, plan.chunk));
  return plan;
}

}  // namespace cuda
}  // namespace dpk
