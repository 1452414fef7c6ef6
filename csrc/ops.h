// The ops, one file each in cpu/ and cuda/; schemas and shapes in dp_bitfit_kernels/_ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dpk {

using torch::stable::Tensor;

Tensor bias_grad(const Tensor& grad);
void bias_grad_(const Tensor& rows, const Tensor& grad);
std::tuple<Tensor, Tensor> clip_factors(const Tensor& rows, const Tensor& offsets, const Tensor& mask,
                                        const Tensor& bounds, const Tensor& grid,
                                        const std::optional<Tensor>& extra_squares, double scale,
                                        const std::optional<double>& gamma);
void clipped_sum_(const Tensor& total, const Tensor& rows, const Tensor& offsets, const Tensor& factors);
Tensor noisy_sum(const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream, int64_t first,
                 double noise_std, double scale);
Tensor random_words(const Tensor& key, const Tensor& step, int64_t stream, int64_t first, int64_t count);

}  // namespace dpk
