// Backward of norms, with the per-sample bias gradient (the sum of grad) from the same visit; and what a norm keeps.
#include "cpu/visit.h"
#include "ops.h"

namespace dpk {

namespace {

const float* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// Statistics of each row or group.
struct Kept {
  const float *shift, *scale, *rstd;
  NormRow operator[](int64_t i) const { return {shift != nullptr ? shift[i] : 0.0f, scale[i], rstd[i]}; }
};

}  // namespace

std::tuple<Tensor, Tensor> layer_norm_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                           const Tensor& scale, const Tensor& rstd,
                                           const std::optional<Tensor>& weight, int64_t reduce) {
  check_layer_norm(grad, x, shift, scale, rstd, weight, reduce);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const bool packed = x.scalar_type() == ScalarType::Char;
  const int64_t width = grad.size(2), bytes = item_bytes(grad), x_bytes = packed ? 1 : bytes;
  const auto loop = kernels().backward->layer_norm_row[type_number(grad)][packed];
  const Kept kept{optional_data(shift), scale.const_data_ptr<float>(), rstd.const_data_ptr<float>()};
  const float* factor = optional_data(weight);
  visit_rows(grad, grad, rows, reduce, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t at = row * width;
      loop(element(grad, bytes, at), element(x, x_bytes, at), width, kept[row], factor, mutable_element(dx, bytes, at));
    }
  });
  return {dx, rows};
}

std::tuple<Tensor, Tensor> group_norm_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& shift,
                                           const Tensor& scale, const Tensor& rstd,
                                           const std::optional<Tensor>& weight) {
  const int64_t groups = check_group_norm(grad, x, shift, scale, rstd, weight);
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, 2);
  const bool packed = x.scalar_type() == ScalarType::Char;
  const int64_t batch = grad.size(0), channels = grad.size(1) / groups, steps = grad.size(2);
  const int64_t bytes = item_bytes(grad), x_bytes = packed ? 1 : bytes;
  const auto loop = kernels().backward->group_norm_group[type_number(grad)][packed];
  const Kept kept{optional_data(shift), scale.const_data_ptr<float>(), rstd.const_data_ptr<float>()};
  const float* factor = optional_data(weight);
  float* out = rows.mutable_data_ptr<float>();
  const int64_t grain = plan_grain(channels * steps * bytes);
  torch::stable::parallel_for(0, batch * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * channels, at = first * steps;
      const float* weights = factor == nullptr ? nullptr : factor + item % groups * channels;
      loop(element(grad, bytes, at), element(x, x_bytes, at), channels, steps, kept[item], weights, out + first,
           mutable_element(dx, bytes, at));
    }
  });
  return {dx, rows};
}

Tensor scale_grad(const Tensor& grad, const Tensor& x, double eps, bool centered) {
  constexpr const char* op = "scale_grad";
  check_reduced(op, grad, 1);
  check_same_shape(op, x, grad);
  check(x.scalar_type() == grad.scalar_type(), op, "x must be ", dtype_name(grad.scalar_type()), " as grad, not ",
        dtype_name(x.scalar_type()));
  check(eps >= 0.0, op, "eps must not be negative");
  const int64_t width = grad.size(2), bytes = item_bytes(grad);
  const Tensor rows = empty_rows(grad, 1);
  const Tensor product = empty_beside(grad, {grad.size(0), grad.size(1), width}, ScalarType::Float);
  const auto loop = kernels().backward->normed_product[type_number(grad)];
  float* out = product.mutable_data_ptr<float>();
  visit_rows(product, product, rows, 1, [&](int64_t first, int64_t count) {
    for (int64_t at = first * width; at < (first + count) * width; at += width) {
      loop(element(grad, bytes, at), element(x, bytes, at), width, eps, centered, out + at);
    }
  });
  return rows;
}

std::tuple<Tensor, Tensor> affine_grad(const Tensor& grad, const Tensor& scale, int64_t reduce) {
  constexpr const char* op = "affine_grad";
  check_reduced(op, grad, reduce);
  check(reduce != 0, op, "reduce must be 1 or 2, not 0");
  check_vector(op, "scale", scale, grad, ScalarType::Float, grad.size(3 - reduce));
  const Tensor dx = empty_as(grad), rows = empty_rows(grad, reduce);
  const int64_t length = grad.size(1), width = grad.size(2), bytes = item_bytes(grad);
  const BackwardKernels& loops = *kernels().backward;
  const int type = type_number(grad);
  const float* factor = scale.const_data_ptr<float>();
  if (reduce == 1) {
    visit_rows(grad, grad, rows, reduce, [&](int64_t first, int64_t count) {
      for (int64_t at = first * width; at < (first + count) * width; at += width) {
        loops.scale_by[type](element(grad, bytes, at), factor, width, mutable_element(dx, bytes, at));
      }
    });
  } else {
    visit_channels(grad, grad, rows, [&](int64_t row, int64_t from, int64_t count) {
      const int64_t last = row * width + from + count;
      for (int64_t at = row * width + from; at < last; at = ++row * width) {
        const int64_t end = std::min(last, (row + 1) * width);
        loops.scale_all[type](element(grad, bytes, at), factor[row % length], end - at, mutable_element(dx, bytes, at));
      }
    });
  }
  return {dx, rows};
}

std::tuple<Tensor, Tensor> quantize_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  constexpr const char* op = "quantize_norm";
  check_float(op, "x", x);
  check(x.dim() == 2, op, "x must be [M, N], not of ", x.dim(), " dimensions");
  const int64_t count = x.size(0), width = x.size(1), bytes = item_bytes(x);
  check_vector(op, "mean", mean, x, ScalarType::Float, count);
  check_vector(op, "rstd", rstd, x, ScalarType::Float, count);
  const Tensor codes = empty_beside(x, {count, width}, ScalarType::Char);
  const Tensor scale = empty_beside(x, {count}, ScalarType::Float);
  const auto loop = kernels().backward->quantize_row[type_number(x)];
  const float *means = mean.const_data_ptr<float>(), *factors = rstd.const_data_ptr<float>();
  int8_t* out = codes.mutable_data_ptr<int8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, count, plan_grain(width * bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * width;
      scales[row] = loop(element(x, bytes, at), width, means[row], factors[row], out + at);
    }
  });
  return {codes, scale};
}

}  // namespace dpk
