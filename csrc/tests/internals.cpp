// Test-only Python module: the planner and the loops of each vector width, one at a time. Pointers are integers
// (tensor.data_ptr()); the tests own the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include "cpu/isa.h"
#include "plan.h"

namespace py = pybind11;

void define_cuda_kernels(py::module_& m);    // cuda_kernels.cpp
void define_backward_loops(py::module_& m);  // backward_loops.cpp

uint64_t fold_bytes(const char* from, int64_t bytes);

namespace {

const dpk::Kernels& named(const std::string& isa) {
  const dpk::Kernels* found = dpk::kernels_named(isa.c_str());
  if (found == nullptr) throw std::invalid_argument("this processor or build has no kernels named " + isa);
  return *found;
}

dpk::ChaChaInput chacha(const std::array<uint32_t, 8>& key, const std::array<uint32_t, 3>& nonce) {
  dpk::ChaChaInput input{};
  std::copy(key.begin(), key.end(), input.key);
  std::copy(nonce.begin(), nonce.end(), input.nonce);
  return input;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_dp_bitfit_native_internals, m) {
  define_cuda_kernels(m);
  define_backward_loops(m);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* name : {"baseline", "avx2", "avx512"}) {
      if (dpk::kernels_named(name) != nullptr) names.emplace_back(name);
    }
    return names;
  });
  m.def("chosen_isa", [] { return dpk::kernels().name; });

  m.attr("MAX_TILE") = dpk::kMaxTile;
  m.def("plan_bias_grad", [](int64_t batch, int64_t steps, int64_t features, int64_t stride_steps,
                             int64_t stride_features, int64_t item_bytes) {
    const auto plan = dpk::plan_bias_grad(batch, steps, features, stride_steps, stride_features, item_bytes);
    const char* layouts[] = {"features_last", "channels_first", "strided"};
    py::dict result;
    result["layout"] = layouts[static_cast<int>(plan.layout)];
    result["tile"] = plan.tile;
    result["tiles"] = plan.tiles;
    result["grain"] = plan.grain;
    return result;
  });

  // type: 0 float32, 1 bfloat16, 2 float16
  m.def("features_last", [](const std::string& isa, int type, uintptr_t in, int64_t steps, int64_t stride,
                            int64_t width, uintptr_t out, bool accumulate) {
    named(isa).features_last[type](pointer<void>(in), steps, stride, width, pointer<float>(out), accumulate);
  });
  m.def("channels_first", [](const std::string& isa, int type, uintptr_t in, int64_t steps, int64_t stride,
                             int64_t width, uintptr_t out, bool accumulate) {
    named(isa).channels_first[type](pointer<void>(in), steps, stride, width, pointer<float>(out), accumulate);
  });
  m.def("sum_of_squares", [](const std::string& isa, uintptr_t in, int64_t count) {
    return named(isa).release->sum_of_squares(pointer<float>(in), count);
  });
  m.def("add_rounded", [](const std::string& isa, uintptr_t total, uintptr_t in, int64_t count, double factor) {
    named(isa).release->add_rounded(pointer<int64_t>(total), pointer<float>(in), count, factor);
  });
  m.def("words", [](const std::string& isa, const std::array<uint32_t, 8>& key, const std::array<uint32_t, 3>& nonce,
                    uint64_t first_block, int64_t blocks) {
    std::vector<uint64_t> out(8 * blocks);
    named(isa).release->words(out.data(), chacha(key, nonce), first_block, blocks);
    return out;
  });
  m.def("normals", [](const std::string& isa, const std::array<uint32_t, 8>& key,
                      const std::array<uint32_t, 3>& nonce, uint64_t first_block, int64_t blocks) {
    std::vector<double> out(8 * ((blocks + 15) / 16 * 16));
    named(isa).release->normals(out.data(), chacha(key, nonce), first_block, blocks);
    out.resize(8 * blocks);
    return out;
  });

  m.def("add_noise", [](const std::string& isa, uintptr_t out, uintptr_t total, uintptr_t z, int64_t count,
                        double noise_std, double scale) {
    named(isa).release->add_noise(pointer<float>(out), pointer<int64_t>(total), pointer<double>(z), count, noise_std, scale);
  });

  m.def("ghost_squares", [](const std::string& isa, uintptr_t left, uintptr_t right, int64_t steps, int64_t width,
                            int64_t depth) {
    const dpk::ReleaseKernels& loops = *named(isa).release;
    const auto scratch = std::make_unique<dpk::Scratch>();
    std::array<double, 4> sums{};
    for (int64_t first = 0; first < steps; first += dpk::kBlock) {
      const dpk::GhostSums part =
          loops.ghost_squares({pointer<float>(left), width, 1}, width, {pointer<float>(right), depth, 1}, depth, steps,
                              first, *scratch);
      sums[0] += part.square, sums[1] += part.products, sums[2] += part.lefts, sums[3] += part.rights;
    }
    return sums;
  });
  // total [rows, columns] of left [steps, rows], right [steps, columns], both at most BLOCK wide
  m.attr("BLOCK") = dpk::kBlock;
  m.def("add_outer_sum", [](const std::string& isa, uintptr_t total, uintptr_t left, int64_t rows, uintptr_t right,
                            int64_t columns, int64_t steps, double factor) {
    named(isa).release->add_outer_sum(pointer<int64_t>(total), columns, {pointer<float>(left), rows, 1}, rows,
                                      {pointer<float>(right), columns, 1}, columns, steps, factor,
                                      *std::make_unique<dpk::Scratch>());
  });

  // Reads memory once on torch's own threads; returns the fold, so that nothing is optimised away.
  m.def("read_bytes", [](uintptr_t from, int64_t bytes) {
    constexpr int64_t piece = 1 << 16;
    std::atomic<uint64_t> fold{0};
    torch::stable::parallel_for(0, (bytes + piece - 1) / piece, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = end * piece < bytes ? end * piece : bytes;
      fold ^= fold_bytes(pointer<char>(from) + begin * piece, last - begin * piece);
    });
    return fold.load();
  });
}
