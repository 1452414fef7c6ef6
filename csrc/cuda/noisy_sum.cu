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

namespace {

void write_noisy_sum(const char* op, float* out, const Tensor& total, const Tensor& key, const Tensor& step,
                     int64_t stream, int64_t first, double noise_std, double scale) {
  const int64_t count = total.numel();
  if (count == 0) return;
  const cuda::NoiseArguments a{stream_of(key, step, stream, first, count), total.const_data_ptr<int64_t>(), out,
                               noise_std, scale};
  const cuda::OnDeviceOf device(total);
  cuda::launch(op, cuda::noisy_sum_kernel_for(a), cuda::blocks_of(a), cuda::kNoiseThreads, device, a);
}

}  // namespace

Tensor noisy_sum(const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream, int64_t first,
                 double noise_std, double scale) {
  check_noisy_sum("noisy_sum", nullptr, total, key, step, stream, first, noise_std);
  const Tensor result = empty_beside(total, {total.numel()}, ScalarType::Float);
  write_noisy_sum("noisy_sum", result.mutable_data_ptr<float>(), total, key, step, stream, first, noise_std, scale);
  return result;
}

void noisy_sum_(const Tensor& release, const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream,
                int64_t first, double noise_std, double scale) {
  check_noisy_sum("noisy_sum_", &release, total, key, step, stream, first, noise_std);
  write_noisy_sum("noisy_sum_", release.mutable_data_ptr<float>(), total, key, step, stream, first, noise_std, scale);
}

}  // namespace dpk
