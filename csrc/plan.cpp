#include "plan.h"

#include <algorithm>

namespace dpk {

namespace {

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

Layout choose_layout(int64_t features, int64_t stride_steps, int64_t stride_features) {
  if (stride_steps == 1 && (stride_features != 1 || features == 1)) return Layout::channels_first;
  if (stride_features == 1) return Layout::features_last;
  return Layout::strided;
}

}  // namespace

int64_t plan_grain(int64_t item_bytes) {
  return std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, item_bytes));
}

BiasGradPlan plan_bias_grad(int64_t batch, int64_t steps, int64_t features, int64_t stride_steps,
                            int64_t stride_features, int64_t item_bytes) {
  BiasGradPlan plan{};
  plan.layout = choose_layout(features, stride_steps, stride_features);
  // A lone sample is cut in two, so that a second thread has work. Tiles are whole vectors of 16 columns; a remainder
  // shorter than a vector joins the last tile, so that a column's loop, and so its bits, depend on features alone.
  int64_t tile = std::min(features, kMaxTile);
  if (batch == 1 && features >= 32 && steps * features * item_bytes > 2 * kBytesPerThread) {
    tile = std::min(tile, divide_up(divide_up(features, 2), 16) * 16);
  }
  plan.tile = std::max<int64_t>(1, tile);
  plan.tiles = features / plan.tile;
  if (features % plan.tile >= 16 || plan.tiles == 0) ++plan.tiles;
  plan.grain = plan_grain(steps * plan.tile * item_bytes);
  return plan;
}

}  // namespace dpk
