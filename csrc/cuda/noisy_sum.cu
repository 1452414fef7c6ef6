// The release, (total + round(noise_std * z)) * scale with z from ChaCha20, and the key stream itself.
#include "cuda/noise_kernel.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace dpk {

namespace {

cuda::StreamArguments stream_of(const Tensor& key, const Tensor& step, int64_t stream, int64_t first, int64_t count) {
  return cuda::stream_arguments(key.const_data_ptr<int32_t>(), step.const_data_ptr<int64_t>(),
                                static_cast<uint32_t>(stream), first, count);
}

}  // namespace

Tensor random_words(const Tensor& key, const Tensor& step, int64_t stream, int64_t first, int64_t count) {
  check_stream("random_words", key, step, stream);
  check_range("random_words", first, count);
  const Tensor result = empty_beside(key, {count}, ScalarType::Long);
  if (count == 0) return result;
  const cuda::WordsArguments a{stream_of(key, step, stream, first, count), result.mutable_data_ptr<int64_t>()};
  const cuda::OnDeviceOf device(key);
  cuda::launch("random_words", cuda::random_words_kernel, cuda::blocks_of(a.stream), cuda::kNoiseThreads, device, a);
  return result;
}

Tensor noisy_sum(const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream, int64_t first,
                 double noise_std, double scale) {
  check_noisy_sum(total, key, step, stream, first, noise_std);
  const int64_t count = total.numel();
  const Tensor result = empty_beside(total, {count}, ScalarType::Float);
  if (count == 0) return result;
  const cuda::NoiseArguments a{stream_of(key, step, stream, first, count), total.const_data_ptr<int64_t>(),
                               result.mutable_data_ptr<float>(), noise_std, scale};
  const cuda::OnDeviceOf device(total);
  cuda::launch("noisy_sum", cuda::noisy_sum_kernel_for(a), cuda::blocks_of(a), cuda::kNoiseThreads, device, a);
  return result;
}

}  // namespace dpk
