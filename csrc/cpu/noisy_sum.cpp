// The release, (total + round(noise_std * z)) * scale with z from ChaCha20, and the key stream itself.
#include <algorithm>

#include "cpu/inputs.h"
#include "ops.h"
#include "plan.h"

namespace dpk {

namespace {

constexpr int64_t kBlocks = 32;  // key-stream blocks made at once: 256 words

// Calls use(words, first word's place in the output, how many) for consecutive pieces of words first ... first + count.
template <class Number, class Make, class Use>
void for_key_stream(int64_t first, int64_t count, Make make, Use use) {
  const int64_t first_block = first / 8, end_block = (first + count + 7) / 8;
  torch::stable::parallel_for(first_block, end_block, plan_grain(64 * 32), [&](int64_t begin, int64_t end) {
    alignas(64) Number buffer[8 * kBlocks];
    for (int64_t block = begin; block < end; block += kBlocks) {
      const int64_t blocks = std::min(kBlocks, end - block);
      make(buffer, static_cast<uint64_t>(block), blocks);
      const int64_t left = std::max(first, 8 * block), right = std::min(first + count, 8 * (block + blocks));
      use(buffer + (left - 8 * block), left - first, right - left);
    }
  });
}

}  // namespace

Tensor random_words(const Tensor& key, const Tensor& step, int64_t stream, int64_t first, int64_t count) {
  check_stream("random_words", key, step, stream);
  check_range("random_words", first, count);
  const ChaChaInput input = chacha_input(key, step, stream);
  Tensor result = empty_beside(key, {count}, ScalarType::Long);
  if (count == 0) return result;
  int64_t* out = result.mutable_data_ptr<int64_t>();
  const ReleaseKernels& loops = *kernels().release;
  for_key_stream<uint64_t>(
      first, count,
      [&](uint64_t* words, uint64_t block, int64_t blocks) { loops.words(words, input, block, blocks); },
      [&](const uint64_t* words, int64_t at, int64_t pieces) {
        for (int64_t i = 0; i < pieces; ++i) out[at + i] = static_cast<int64_t>(words[i]);
      });
  return result;
}

namespace {

void write_noisy_sum(float* out, const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream,
                     int64_t first, double noise_std, double scale) {
  const ChaChaInput input = chacha_input(key, step, stream);
  const int64_t count = total.numel();
  if (count == 0) return;
  const int64_t* in = total.const_data_ptr<int64_t>();
  if (noise_std == 0.0) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<double>(in[i]) * scale);
    return;
  }
  const ReleaseKernels& loops = *kernels().release;
  for_key_stream<double>(
      first, count,
      [&](double* normals, uint64_t block, int64_t blocks) { loops.normals(normals, input, block, blocks); },
      [&](const double* z, int64_t at, int64_t pieces) {
        loops.add_noise(out + at, in + at, z, pieces, noise_std, scale);
      });
}

}  // namespace

Tensor noisy_sum(const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream, int64_t first,
                 double noise_std, double scale) {
  check_noisy_sum("noisy_sum", nullptr, total, key, step, stream, first, noise_std);
  Tensor result = empty_beside(total, {total.numel()}, ScalarType::Float);
  write_noisy_sum(result.mutable_data_ptr<float>(), total, key, step, stream, first, noise_std, scale);
  return result;
}

void noisy_sum_(const Tensor& release, const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream,
                int64_t first, double noise_std, double scale) {
  check_noisy_sum("noisy_sum_", &release, total, key, step, stream, first, noise_std);
  write_noisy_sum(release.mutable_data_ptr<float>(), total, key, step, stream, first, noise_std, scale);
}

}  // namespace dpk
