// Input gradients of norms. A row (layer norm) or group (group norm) is read twice: for the means of g = weight * grad
// and g * n, then for dx = rstd * (g - mean(g) - n * mean(g * n)), from the cache that the first reading filled.

constexpr int64_t kMeanItems = 32 * 2 * kLanes;  // at most 34 additions in each of 32 lanes, then float64

struct Sums {
  double grad, product;
};

// Adds the lanes of both as trees.
DPK_INLINE void add_lanes(Sums& sums, const Lanes& grad, const Lanes& product) {
  HalfLanes half[8] = {};
  half[0] = Float32::fold(grad);
  half[1] = Float32::fold(product);
  float sum[8];
  tree_sums8(half, sum);
  sums.grad += double(sum[0]);
  sums.product += double(sum[1]);
}

// Sums of g and g * (x - shift) over `count` neighbours. While a row is summed, the place of its dx is fetched; while
// that is written, the next row is.
template <class T, class X, bool weighted>
DPK_INLINE Sums norm_sums(const typename T::Item* grad, const typename X::Item* x, const float* weight, float shift,
                          int64_t count, const typename T::Item* dx) {
  Sums sums = {};
  Lanes a[2] = {zero_lanes(), zero_lanes()}, b[2] = {zero_lanes(), zero_lanes()};
  const auto add = [&](int64_t at, int k) __attribute__((always_inline)) {
    __builtin_prefetch(dx + at, 1);
    Lanes g = T::load(grad + at);
    if (weighted) g = g * Float32::load(weight + at);
    a[k] = a[k] + g;
    b[k] = b[k] + g * (X::load(x + at) - shift);
  };
  int64_t i = 0;
  while (i + kLanes <= count) {
    const int64_t end = count - i < kMeanItems ? count : i + kMeanItems;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) add(i, 0), add(i + kLanes, 1);
    if (i + kLanes <= end) add(i, 0), i += kLanes;
    if (i + kLanes > count) break;
    add_lanes(sums, a[0] + a[1], b[0] + b[1]);
    for (int k = 0; k < 2; ++k) a[k] = b[k] = zero_lanes();
  }
  if (i < count) {
    Lanes g = load_some<T>(grad + i, count - i);
    if (weighted) g = g * load_some<PlainFloat32>(weight + i, count - i);
    // What lies beyond must add nothing, even where shift is odd.
    a[1] = a[1] + g;
    b[1] = b[1] + keep_first(g * (load_some<X>(x + i, count - i) - shift), count - i);
  }
  add_lanes(sums, a[0] + a[1], b[0] + b[1]);
  return sums;
}

// dx = grad * factor - (offset + (x - shift) * slope); the factor is one number, or weight [count] times rstd.
struct NormLine {
  float shift, factor, offset, slope;
};

template <class T, class X, bool weighted>
DPK_INLINE void norm_dx(const typename T::Item* grad, const typename X::Item* x, const float* weight,
                        const NormLine& line, int64_t count, typename T::Item* dx) {
  const auto at = [&](const Lanes& g, const Lanes& x) __attribute__((always_inline)) {
    return g * line.factor - (line.offset + (x - line.shift) * line.slope);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(grad + i + count);
    __builtin_prefetch(x + i + count);
    Lanes g = T::load(grad + i);
    if (weighted) g = g * Float32::load(weight + i);
    T::store(dx + i, at(g, X::load(x + i)));
  }
  if (i < count) {
    Lanes g = load_some<T>(grad + i, count - i);
    if (weighted) g = g * load_some<PlainFloat32>(weight + i, count - i);
    store_some<T>(dx + i, at(g, load_some<X>(x + i, count - i)), count - i);
  }
}

// With n = (x - shift) * scale: rstd * mean(g), and rstd * mean(g * n) * scale as the slope.
DPK_INLINE NormLine norm_line(const Sums& sums, double count, const NormRow& norm) {
  const double offset = sums.grad / count * double(norm.rstd);
  const double slope = sums.product / count * double(norm.scale) * double(norm.scale) * double(norm.rstd);
  return {norm.shift, norm.rstd, float(offset), float(slope)};
}

template <class T, class X, bool weighted>
DPK_INLINE void layer_norm_dx(const void* from, const void* at, int64_t count, const NormRow& norm,
                              const float* weight, void* to) {
  const auto* grad = static_cast<const typename T::Item*>(from);
  const auto* x = static_cast<const typename X::Item*>(at);
  auto* dx = static_cast<typename T::Item*>(to);
  const Sums sums = norm_sums<T, X, weighted>(grad, x, weight, norm.shift, count, dx);
  const NormLine line = norm_line(sums, double(count), norm);
  norm_dx<T, X, weighted>(grad, x, weight, line, count, dx);
}

template <class T, class X>
void layer_norm_row(const void* grad, const void* x, int64_t count, const NormRow& norm, const float* weight,
                    void* dx) {
  if (weight != nullptr) {
    layer_norm_dx<T, X, true>(grad, x, count, norm, weight, dx);
  } else {
    layer_norm_dx<T, X, false>(grad, x, count, norm, weight, dx);
  }
}

// The sum of of(x) over `count` neighbours.
template <class T, class Of>
DPK_INLINE double sum_over(const typename T::Item* x, int64_t count, const Of& of) {
  Sums sums = {};
  int64_t i = 0;
  while (i < count) {
    const int64_t end = count - i < kMeanItems ? count : i + kMeanItems;
    Lanes a[2] = {zero_lanes(), zero_lanes()};
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      a[0] = a[0] + of(T::load(x + i));
      a[1] = a[1] + of(T::load(x + i + kLanes));
    }
    if (i + kLanes <= end) a[0] = a[0] + of(T::load(x + i)), i += kLanes;
    if (i < end) a[1] = a[1] + keep_first(of(load_some<T>(x + i, end - i)), end - i), i = end;
    add_lanes(sums, a[0], a[1]);
  }
  return sums.grad + sums.product;
}

// out = grad * n of one row, n = (x - mean) / sqrt(var + eps); where not centered, with 0 for the mean. The row is read
// three times, from the cache after the first.
template <class T>
void normed_product(const void* from, const void* at, int64_t count, double eps, bool centered, float* out) {
  const auto* grad = static_cast<const typename T::Item*>(from);
  const auto* x = static_cast<const typename T::Item*>(at);
  const auto itself = [](const Lanes& x) __attribute__((always_inline)) { return x; };
  const float mean = centered ? float(sum_over<T>(x, count, itself) / double(count)) : 0.0f;
  const auto square = [&](const Lanes& x) __attribute__((always_inline)) {
    const Lanes off = x - mean;
    return off * off;
  };
  const double variance = sum_over<T>(x, count, square) / double(count);
  const float rstd = float(1.0 / __builtin_sqrt(variance + eps));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Float32::store(out + i, T::load(grad + i) * ((T::load(x + i) - mean) * rstd));
  }
  if (i < count) {
    const int64_t rest = count - i;
    const Lanes n = (load_some<T>(x + i, rest) - mean) * rstd;
    store_some<PlainFloat32>(out + i, load_some<T>(grad + i, rest) * n, rest);
  }
}

template <class T, class X>
void group_norm_group(const void* from, const void* at, int64_t channels, int64_t steps, const NormRow& norm,
                      const float* weight, float* rows, void* to) {
  const auto* grad = static_cast<const typename T::Item*>(from);
  const auto* x = static_cast<const typename X::Item*>(at);
  auto* dx = static_cast<typename T::Item*>(to);
  Sums group = {};
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t at = c * steps;
    const Sums channel = norm_sums<T, X, false>(grad + at, x + at, nullptr, norm.shift, steps, dx + at);
    const double factor = weight != nullptr ? double(weight[c]) : 1.0;
    group.grad += factor * channel.grad;
    group.product += factor * channel.product;
    rows[c] = float(channel.grad);
  }
  NormLine line = norm_line(group, double(channels) * double(steps), norm);
  for (int64_t c = 0; c < channels; ++c) {
    line.factor = weight != nullptr ? norm.rstd * weight[c] : norm.rstd;
    const int64_t at = c * steps;
    norm_dx<T, X, false>(grad + at, x + at, nullptr, line, steps, dx + at);
  }
}

// Codes of one row of (x - mean) * rstd: 127 is its largest magnitude. An odd value makes the scale 1, and a NaN is 0.
template <class T>
float quantize_row(const void* from, int64_t count, float mean, float rstd, int8_t* codes) {
  const auto* x = static_cast<const typename T::Item*>(from);
  const auto normalised = [&](const Lanes& x) __attribute__((always_inline)) {
    return (x - mean) * rstd;
  };
  // Magnitudes compare as integers; that of a NaN is above that of an infinity.
  vi high[N] = {};
  const auto compare = [&](const Lanes& n) __attribute__((always_inline)) {
    for (int i = 0; i < N; ++i) {
      const vi size = as<vi>(n.v[i]) & 0x7fffffff;
      high[i] = size > high[i] ? size : high[i];
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) compare(normalised(T::load(x + i)));
  if (i < count) compare(keep_first(normalised(load_some<T>(x + i, count - i)), count - i));
  int32_t bits = 0;
  for (int k = 0; k < N; ++k) {
    for (int lane = 0; lane < W; ++lane) bits = high[k][lane] > bits ? high[k][lane] : bits;
  }
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const float scale = bits > 0 && bits < 0x7f800000 ? largest / 127.0f : 1.0f;

  const auto rounded = [&](const Lanes& n, int8_t* to) __attribute__((always_inline)) {
    vi numbers[N];
    for (int k = 0; k < N; ++k) {
      vf value = n.v[k] / scale;
      value = value > 127.0f ? all(127.0f) : value;
      value = value < -127.0f ? all(-127.0f) : value;
      value = value == value ? value : vf{};
      numbers[k] = __builtin_convertvector(value + 127.5f, vi) - 127;  // of positive numbers the floor
    }
    Int8::store(to, numbers);
  };
  for (i = 0; i + kLanes <= count; i += kLanes) rounded(normalised(T::load(x + i)), codes + i);
  if (i < count) {
    int8_t last[kLanes];
    rounded(normalised(load_some<T>(x + i, count - i)), last);
    __builtin_memcpy(codes + i, last, size_t(count - i));
  }
  return scale;
}
