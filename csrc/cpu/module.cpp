// Registers the CPU ops when the module is imported. The schemas come from dp_bitfit_kernels/_ops.py, imported before.
#include <Python.h>

#include "cpu/isa.h"
#include "ops.h"
#include "register.h"

STABLE_TORCH_LIBRARY_IMPL(dp_bitfit_kernels, CPU, m) {
  dpk::register_ops(m);
  dpk::register_backward_ops(m);
  m.impl("ghost_squares", TORCH_BOX(&dpk::ghost_squares));
  m.impl("scale_grad", TORCH_BOX(&dpk::scale_grad));
  m.impl("clipped_index_sum_", TORCH_BOX(&dpk::clipped_index_sum_));
  m.impl("clipped_outer_sum_", TORCH_BOX(&dpk::clipped_outer_sum_));
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
