// How the ops reach the device: its guard, torch's current stream, the check after a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace dpk {
namespace cuda {

// Makes the device of `like` current for its lifetime, and knows torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// One block a unit of work; a grid has at most 2^31 - 1 of them along x.
template <class Arguments>
void launch(const char* op, void (*kernel)(Arguments), int64_t blocks, int threads, const OnDeviceOf& device,
            const Arguments& arguments) {
  check(blocks <= INT32_MAX, op, "the tensor is too large: ", blocks, " blocks of work");
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, device.stream()>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, op, cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace dpk
