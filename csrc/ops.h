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
void noisy_sum_(const Tensor& release, const Tensor& total, const Tensor& key, const Tensor& step, int64_t stream,
                int64_t first, double noise_std, double scale);
Tensor random_words(const Tensor& key, const Tensor& step, int64_t stream, int64_t first, int64_t count);
// On a CPU alone: elsewhere the libraries' products are faster.
std::tuple<Tensor, Tensor> ghost_squares(const Tensor& left, const Tensor& right);
void clipped_index_sum_(const Tensor& total, const Tensor& ids, const Tensor& vectors, const Tensor& factors);
void clipped_outer_sum_(const Tensor& total, const Tensor& left, const Tensor& right, const Tensor& factors,
                        bool fresh);
Tensor scale_grad(const Tensor& grad, const Tensor& x, double eps, bool centered);

// What keeps little for backward.
Tensor pack_bits(const Tensor& mask);
std::tuple<Tensor, Tensor> clamp_pack(const Tensor& x, double low, double high, double slope);
Tensor clamp_pack_(const Tensor& x, double low, double high, double slope);
std::tuple<Tensor, Tensor> bit_scale(const Tensor& x, const Tensor& bits, double on, double off, int64_t reduce);
std::tuple<Tensor, Tensor> activation_grad(const Tensor& grad, const Tensor& x, int64_t kind, int64_t reduce);
std::tuple<Tensor, Tensor> slope_pack(const Tensor& x, int64_t kind);
std::tuple<Tensor, Tensor> slope_scale(const Tensor& grad, const Tensor& codes, int64_t reduce);
Tensor level_pack(const Tensor& x, const Tensor& edges);
std::tuple<Tensor, Tensor> level_scale(const Tensor& grad, const Tensor& planes, const Tensor& levels, int64_t reduce);
std::tuple<Tensor, Tensor> quantize_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd);
std::tuple<Tensor, Tensor> layer_norm_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                           const Tensor& scale, const Tensor& rstd,
                                           const std::optional<Tensor>& weight, int64_t reduce);
std::tuple<Tensor, Tensor> group_norm_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                           const Tensor& scale, const Tensor& rstd,
                                           const std::optional<Tensor>& weight);
std::tuple<Tensor, Tensor> affine_grad(const Tensor& grad, const Tensor& scale, int64_t reduce);

}  // namespace dpk
