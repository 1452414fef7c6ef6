// Test-only: the loops of isa_backward.h of each vector width, one at a time. Pointers are integers
// (tensor.data_ptr()); the tests own the memory. type: 0 float32, 1 bfloat16, 2 float16.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

const dpk::BackwardKernels& named(const std::string& isa) {
  const dpk::Kernels* found = dpk::kernels_named(isa.c_str());
  if (found == nullptr) throw std::invalid_argument("this processor or build has no kernels named " + isa);
  return *found->backward;
}

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void define_backward_loops(py::module_& m) {
  using Name = const std::string&;
  using Address = uintptr_t;
  m.def("pack_bits", [](Name isa, Address mask, int64_t count, Address bits) {
    named(isa).pack_bits(at(mask), count, at<uint8_t>(bits));
  });
  m.def("clamp_pack", [](Name isa, int type, Address x, int64_t count, float low, float high, float slope, Address y,
                         Address bits) {
    named(isa).clamp_pack[type](at(x), count, {low, high, slope}, at(y), at<uint8_t>(bits));
  });
  m.def("bit_scale", [](Name isa, int type, Address x, Address bits, int64_t first, int64_t count, float on, float off,
                        Address y) {
    named(isa).bit_scale[type](at(x), at<uint8_t>(bits), first, count, on, off, at(y));
  });
  m.def("activation_grad", [](Name isa, int type, int kind, Address grad, Address x, int64_t count, Address dx) {
    named(isa).activation_grad[kind][type](at(grad), at(x), count, at(dx));
  });
  m.def("slope_pack", [](Name isa, int kind, Address x, int64_t count, Address y, Address codes, int64_t stride) {
    named(isa).slope_pack[kind](at<float>(x), count, at<float>(y), at<uint8_t>(codes), stride);
  });
  m.def("slope_scale", [](Name isa, Address grad, Address codes, int64_t stride, int64_t count, Address dx) {
    named(isa).slope_scale(at<float>(grad), at<uint8_t>(codes), stride, count, at<float>(dx));
  });
  m.def("level_pack", [](Name isa, int type, Address x, Address edges, int64_t count, Address planes, int64_t stride) {
    named(isa).level_pack[type](at(x), at<float>(edges), count, at<uint8_t>(planes), stride);
  });
  m.def("level_scale", [](Name isa, int type, Address grad, Address planes, int64_t stride, int64_t first,
                          int64_t count, Address levels, Address dx) {
    named(isa).level_scale[type](at(grad), at<uint8_t>(planes), stride, first, count, at<float>(levels), at(dx));
  });
  m.def("normed_product", [](Name isa, int type, Address grad, Address x, int64_t count, double eps, bool centered,
                             Address out) {
    named(isa).normed_product[type](at(grad), at(x), count, eps, centered, at<float>(out));
  });
  m.def("quantize_row", [](Name isa, int type, Address x, int64_t count, float mean, float rstd, Address codes) {
    return named(isa).quantize_row[type](at(x), count, mean, rstd, at<int8_t>(codes));
  });
  m.def("layer_norm_row", [](Name isa, int type, bool packed, Address grad, Address x, int64_t count, float shift,
                             float scale, float rstd, Address weight, Address dx) {
    named(isa).layer_norm_row[type][packed](at(grad), at(x), count, {shift, scale, rstd}, at<float>(weight), at(dx));
  });
  m.def("group_norm_group", [](Name isa, int type, bool packed, Address grad, Address x, int64_t channels,
                               int64_t steps, float shift, float scale, float rstd, Address weight, Address sums,
                               Address dx) {
    named(isa).group_norm_group[type][packed](at(grad), at(x), channels, steps, {shift, scale, rstd},
                                              at<float>(weight), at<float>(sums), at(dx));
  });
  m.def("scale_by", [](Name isa, int type, Address grad, Address scale, int64_t count, Address dx) {
    named(isa).scale_by[type](at(grad), at<float>(scale), count, at(dx));
  });
  m.def("scale_all", [](Name isa, int type, Address grad, float factor, int64_t count, Address dx) {
    named(isa).scale_all[type](at(grad), factor, count, at(dx));
  });
  m.def("add_rows", [](Name isa, int type, Address block, int64_t rows, int64_t width, Address sums, bool first) {
    named(isa).add_rows[type](at(block), rows, width, at<float>(sums), first);
  });
}
