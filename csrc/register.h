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
  m.impl("random_words", TORCH_BOX(&random_words));
}

}  // namespace dpk
