// What both modules register: every op of ops.h, under the key of the device it is compiled for.
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace dpk {

template <class Library>
void register_ops(Library& m) {
  m.impl("bias_grad", TORCH_BOX(&bias_grad));
  m.impl("bias_grad_", TORCH_BOX(&bias_grad_));
  m.impl("clip_factors", TORCH_BOX(&clip_factors));
  m.impl("clipped_sum_", TORCH_BOX(&clipped_sum_));
  m.impl("noisy_sum", TORCH_BOX(&noisy_sum));
  m.impl("noisy_sum_", TORCH_BOX(&noisy_sum_));
  m.impl("random_words", TORCH_BOX(&random_words));
}

template <class Library>
void register_backward_ops(Library& m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("clamp_pack", TORCH_BOX(&clamp_pack));
  m.impl("clamp_pack_", TORCH_BOX(&clamp_pack_));
  m.impl("bit_scale", TORCH_BOX(&bit_scale));
  m.impl("activation_grad", TORCH_BOX(&activation_grad));
  m.impl("slope_pack", TORCH_BOX(&slope_pack));
  m.impl("slope_scale", TORCH_BOX(&slope_scale));
  m.impl("level_pack", TORCH_BOX(&level_pack));
  m.impl("level_scale", TORCH_BOX(&level_scale));
  m.impl("quantize_norm", TORCH_BOX(&quantize_norm));
  m.impl("layer_norm_grad", TORCH_BOX(&layer_norm_grad));
  m.impl("group_norm_grad", TORCH_BOX(&group_norm_grad));
  m.impl("affine_grad", TORCH_BOX(&affine_grad));
}

}  // namespace dpk
