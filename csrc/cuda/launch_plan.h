// Launch planning for the CUDA kernels. Pure C++: no torch, no device query. A plan depends on the shape, the strides
// and the address of one sample, never on the batch size or the card: a row has the same bits whatever it comes with.
#pragma once

#include <cstdint>

#include "plan.h"

namespace dpk {
namespace cuda {

struct BiasGradShape {
  int64_t batch, steps, features;                       // B, T, p
  int64_t stride_batch, stride_steps, stride_features;  // in elements
  int64_t item_bytes;
  uint64_t address;
};

struct BiasGradPlan {
  Layout layout;
  int packet;      // elements of one load: the most, up to 16 bytes, that every row or channel is aligned to
  int lanes;       // threads side by side along the contiguous dimension, a power of two
  int64_t chunk;   // steps of one block
  int64_t splits;  // blocks along T; more than one: a second launch sums their partial sums
  int64_t tiles;   // blocks along p
};

BiasGradPlan plan_bias_grad(const BiasGradShape& shape);

}  // namespace cuda
}  // namespace dpk
