// Registers the CPU ops when the module is imported. The schemas come from dp_bitfit_kernels/_ops.py, imported before.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dp_bitfit_kernels, CPU, m) {
  m.impl("bias_grad", TORCH_BOX(&dpk::bias_grad));
  m.impl("bias_grad_", TORCH_BOX(&dpk::bias_grad_));
  m.impl("clip_factors", TORCH_BOX(&dpk::clip_factors));
  m.impl("clipped_sum_", TORCH_BOX(&dpk::clipped_sum_));
  m.impl("noisy_sum", TORCH_BOX(&dpk::noisy_sum));
  m.impl("random_words", TORCH_BOX(&dpk::random_words));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_C";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  // The vector width in use, for environment reports.
  if (module != nullptr) PyModule_AddStringConstant(module, "isa", dpk::kernels().name);
  return module;
}
