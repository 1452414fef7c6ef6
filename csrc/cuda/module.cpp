// Registers the CUDA ops when the module is imported. The schemas come from dp_bitfit_kernels/_ops.py, imported before.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dp_bitfit_kernels, CUDA, m) {
  m.impl("bias_grad", TORCH_BOX(&dpk::bias_grad));
  m.impl("bias_grad_", TORCH_BOX(&dpk::bias_grad_));
  m.impl("clip_factors", TORCH_BOX(&dpk::clip_factors));
  m.impl("clipped_sum_", TORCH_BOX(&dpk::clipped_sum_));
  m.impl("noisy_sum", TORCH_BOX(&dpk::noisy_sum));
  m.impl("random_words", TORCH_BOX(&dpk::random_words));
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_C_cuda";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  // Compute capabilities with machine code of their own, for environment reports; newer cards translate the PTX.
  if (module != nullptr) PyModule_AddStringConstant(module, "architectures", DPK_CUDA_ARCHITECTURES);
  return module;
}
