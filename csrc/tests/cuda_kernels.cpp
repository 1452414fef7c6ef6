// The CUDA kernels on a CPU, launched as the .cu files launch them, for the tests. Pointers are integers
// (tensor.data_ptr()); the tests own the memory. Compiled without contraction, as the .cu files are.
#include "tests/cuda_on_cpu.h"

#include <pybind11/pybind11.h>

#include "cuda/bias_grad_kernel.cuh"
#include "cuda/clip_factors_kernel.cuh"
#include "cuda/clipped_sum_kernel.cuh"
#include "cuda/noise_kernel.cuh"

namespace py = pybind11;

namespace {

using namespace dpk;
using emulated::launch;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const char* kLayouts[] = {"features_last", "channels_first", "strided"};

py::dict plan(const cuda::BiasGradShape& shape) {
  const cuda::BiasGradPlan made = cuda::plan_bias_grad(shape);
  py::dict result;
  result["layout"] = kLayouts[static_cast<int>(made.layout)];
  result["packet"] = made.packet;
  result["lanes"] = made.lanes;
  result["chunk"] = made.chunk;
  result["splits"] = made.splits;
  result["tiles"] = made.tiles;
  return result;
}

}  // namespace

void define_cuda_backward(py::module_& m);

void define_cuda_kernels(py::module_& m) {
  define_cuda_backward(m);
  m.def("cuda_plan_bias_grad",
        [](int64_t batch, int64_t steps, int64_t features, int64_t stride_batch, int64_t stride_steps,
           int64_t stride_features, int64_t item_bytes, uintptr_t address) {
          return plan({batch, steps, features, stride_batch, stride_steps, stride_features, item_bytes, address});
        });

  // One stage; the caller sums the partial sums in another call, as the op does. type: 0 float32, 1 bfloat16, 2 float16
  m.def("cuda_bias_grad",
        [](int type, uintptr_t grad, int64_t batch, int64_t steps, int64_t features, int64_t stride_batch,
           int64_t stride_steps, int64_t stride_features, uintptr_t out, int64_t stride_out_batch,
           int64_t stride_out_split, bool accumulate) {
          const cuda::BiasGradPlan made = cuda::plan_bias_grad({batch, steps, features, stride_batch, stride_steps,
                                                                stride_features, type == 0 ? 4 : 2, grad});
          cuda::BiasGradArguments a{};
          a.grad = pointer<const void>(grad);
          a.out = pointer<float>(out);
          a.steps = steps;
          a.features = features;
          a.stride_batch = stride_batch;
          a.stride_steps = stride_steps;
          a.stride_features = stride_features;
          a.stride_out_batch = stride_out_batch;
          a.stride_out_split = stride_out_split;
          a.chunk = made.chunk;
          a.splits = made.splits;
          a.tiles = made.tiles;
          a.lanes = made.lanes;
          a.accumulate = accumulate;
          launch(cuda::bias_grad_kernel(type, made.layout, made.packet), batch * made.splits * made.tiles,
                 cuda::kReduceThreads, a);
        });

  m.def("cuda_clip_factors",
        [](uintptr_t rows, int64_t batch, int64_t stride, uintptr_t offsets, int64_t groups, uintptr_t mask,
           uintptr_t bounds, uintptr_t grid, uintptr_t extra, uintptr_t factors, uintptr_t norms, double scale,
           double gamma, bool flat) {
          cuda::ClipArguments a{};
          a.rows = pointer<const float>(rows);
          a.stride = stride;
          a.offsets = pointer<const int64_t>(offsets);
          a.mask = pointer<const bool>(mask);
          a.bounds = pointer<const double>(bounds);
          a.grid = pointer<const double>(grid);
          a.extra = pointer<const double>(extra);
          a.factors = pointer<double>(factors);
          a.norms = pointer<double>(norms);
          a.groups = groups;
          a.scale = scale;
          a.gamma = gamma;
          a.flat = flat;
          launch(cuda::clip_factors_kernel, batch, cuda::kNormThreads, a);
        });

  m.def("cuda_clipped_sum",
        [](uintptr_t total, uintptr_t rows, int64_t batch, int64_t columns, int64_t stride, uintptr_t offsets,
           uintptr_t factors, int64_t groups) {
          cuda::SumArguments a{};
          a.total = pointer<int64_t>(total);
          a.rows = pointer<const float>(rows);
          a.stride = stride;
          a.offsets = pointer<const int64_t>(offsets);
          a.factors = pointer<const double>(factors);
          a.batch = batch;
          a.columns = columns;
          a.groups = groups;
          launch(cuda::clipped_sum_kernel_for(a), cuda::blocks_of(a), cuda::kSumThreads, a);
        });

  const auto stream = [](uintptr_t key, uintptr_t step, uint32_t number, int64_t first, int64_t count) {
    return cuda::stream_arguments(pointer<const int32_t>(key), pointer<const int64_t>(step), number, first, count);
  };
  m.def("cuda_noisy_sum", [stream](uintptr_t total, uintptr_t key, uintptr_t step, uint32_t number, int64_t first,
                                   int64_t count, double noise_std, double scale, uintptr_t out) {
    const cuda::NoiseArguments a{stream(key, step, number, first, count), pointer<const int64_t>(total),
                                 pointer<float>(out), noise_std, scale};
    launch(cuda::noisy_sum_kernel_for(a), cuda::blocks_of(a), cuda::kNoiseThreads, a);
  });
  m.def("cuda_random_words", [stream](uintptr_t key, uintptr_t step, uint32_t number, int64_t first, int64_t count,
                                      uintptr_t out) {
    const cuda::WordsArguments a{stream(key, step, number, first, count), pointer<int64_t>(out)};
    launch(cuda::random_words_kernel, cuda::blocks_of(a.stream), cuda::kNoiseThreads, a);
  });
}
