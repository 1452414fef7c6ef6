// The CUDA kernels of the ops that keep little for backward on a CPU, launched as the .cu files launch them.
#include "tests/cuda_on_cpu.h"

#include <pybind11/pybind11.h>

#include "cuda/norm_grad_launch.cuh"
#include "cuda/packed_kernel.cuh"
#include "cuda/scale_kernel.cuh"

namespace py = pybind11;

namespace {

using namespace dpk;
using emulated::launch;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Factor>
cuda::ScaleKernel kernel_of(int type, const cuda::ScaleLaunch& made) {
  return cuda::scale_kernel<Factor>(type, made.layout, made.packet);
}

// Bytes of an element of what was kept that must be aligned as grad is; 0: any address will do.
int64_t kept_bytes(const std::string& factor, int64_t item_bytes) {
  return factor == "activation" ? item_bytes : factor == "codes" ? 1 : 0;
}

}  // namespace

// type: 0 float32, 1 bfloat16, 2 float16. Pointers are integers; 0 is none.
void define_cuda_backward(py::module_& m) {
  // First stage. With out = 0 only plans; returns the shape [B, splits, p] of out.
  m.def("cuda_scale", [](const std::string& factor, int type, uintptr_t grad, int64_t batch, int64_t length,
                         int64_t width, int reduce, uintptr_t kept, uintptr_t table, float on, float off, int kind,
                         uintptr_t dx, uintptr_t out) {
    const int64_t bytes = type == 0 ? 4 : 2, of_kept = kept_bytes(factor, bytes);
    uint64_t all = grad | dx;
    if (of_kept > 0) all |= kept * static_cast<uint64_t>(bytes / of_kept);
    cuda::ScaleLaunch made = cuda::plan_scale(batch, length, width, reduce, bytes, all);
    cuda::ScaleArguments& a = made.arguments;
    a.sums.grad = pointer<const void>(grad);
    a.sums.out = pointer<float>(out);
    a.dx = pointer<void>(dx);
    a.kept = pointer<const void>(kept);
    a.table = pointer<const float>(table);
    a.on = on;
    a.off = off;
    a.kind = kind;
    if (out != 0) {
      const cuda::ScaleKernel kernel = factor == "bits"         ? kernel_of<cuda::Bits>(type, made)
                                       : factor == "activation" ? kernel_of<cuda::Activation>(type, made)
                                       : factor == "codes"      ? kernel_of<cuda::Codes>(type, made)
                                       : factor == "levels"     ? kernel_of<cuda::Levels>(type, made)
                                                                : kernel_of<cuda::Columns>(type, made);
      launch(kernel, made.blocks, cuda::kReduceThreads, a);
    }
    return py::make_tuple(made.batch, made.splits, made.features);
  });

  m.def("cuda_pack", [](const std::string& op, int type, uintptr_t x, int64_t count, uintptr_t y, uintptr_t out,
                        uintptr_t edges, float low, float high, float slope, int kind) {
    cuda::PackArguments a{};
    a.x = pointer<const void>(x);
    a.y = pointer<void>(y);
    a.out = pointer<uint8_t>(out);
    a.edges = pointer<const float>(edges);
    a.count = count;
    a.low = low;
    a.high = high;
    a.slope = slope;
    a.kind = kind;
    const cuda::PackKernel kernel = op == "pack_bits"    ? cuda::pack_bits_kernel_for(a)
                                    : op == "clamp_pack" ? cuda::clamp_pack_kernel_for(a, type)
                                    : op == "level_pack" ? cuda::level_pack_kernel_for(a, type)
                                                         : cuda::slope_pack_kernel_for(a);
    const int each = op == "slope_pack" ? cuda::slope_pack_each(a) : 8;
    launch(kernel, cuda::blocks_of(count, each), cuda::kPackThreads, a);
  });

  // A layer norm (length, width: R, C; `all` samples) or group norm (K, S; `all` groups of all samples). With dx = 0
  // only plans; returns the splits of a sample, 0 where a row is too wide.
  m.def("cuda_norm_grad", [](bool layer, int type, bool packed, uintptr_t grad, uintptr_t x, uintptr_t shift,
                             uintptr_t scale, uintptr_t rstd, uintptr_t weight, uintptr_t dx, uintptr_t out,
                             int64_t all, int64_t groups, int64_t length, int64_t width) -> int64_t {
    cuda::NormArguments a{};
    a.grad = pointer<const void>(grad);
    a.x = pointer<const void>(x);
    a.shift = pointer<const float>(shift);
    a.scale = pointer<const float>(scale);
    a.rstd = pointer<const float>(rstd);
    a.weight = pointer<const float>(weight);
    a.dx = pointer<void>(dx);
    a.out = pointer<float>(out);
    a.length = length;
    a.width = width;
    const int bytes = type == 0 ? 4 : 2, x_bytes = packed ? 1 : bytes;
    const int packet = layer ? cuda::plan_layer_norm(a, bytes, x_bytes)
                             : cuda::plan_group_norm(a, groups, bytes, x_bytes);
    if (packet == 0) return 0;
    if (dx != 0) launch(cuda::norm_kernel(layer, type, packed, packet), all * a.splits, a.threads, a);
    return a.splits;
  });

  m.def("cuda_quantize_norm", [](int type, uintptr_t x, int64_t count, int64_t width, uintptr_t mean, uintptr_t rstd,
                                 uintptr_t codes, uintptr_t scale) {
    cuda::QuantizeArguments a{};
    a.x = pointer<const void>(x);
    a.mean = pointer<const float>(mean);
    a.rstd = pointer<const float>(rstd);
    a.codes = pointer<int8_t>(codes);
    a.scale = pointer<float>(scale);
    a.count = count;
    a.width = width;
    const cuda::QuantizeKernel kernel = cuda::plan_quantize_norm(a, type);
    launch(kernel, cuda::blocks_of(a), cuda::kNormGradThreads, a);
  });
}
