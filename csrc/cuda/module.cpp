// Registers the CUDA ops when the module is imported. The schemas come from dp_bitfit_kernels/_ops.py, imported before.
#include <Python.h>

#include "register.h"

STABLE_TORCH_LIBRARY_IMPL(dp_bitfit_kernels, CUDA, m) {
  dpk::register_ops(m);
  dpk::register_backward_ops(m);
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
