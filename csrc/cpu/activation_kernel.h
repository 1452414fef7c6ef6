// Derivatives of activations, and activations with the 24-bit codes of their derivatives.
//
// All four are f(x) = x s(x) with s(-x) = 1 - s(x), so that both are taken of what is left at t = |x|:
//     q = 1 - s(t):        f(x)  = max(x, 0) - t q
//     p = 1 - f'(t):       f'(x) = 1 - p for x >= 0, p below
// Each is an exponential of a number that is not positive times something smooth: no cancellation, errors near 2^-24.
// Multiply and add stay apart and every width takes the same steps, so every width gives the same bits.

// Nearest integer of |value| < 2^31, ties to even, as an integer and as a float.
#if defined(__AVX2__)
DPK_INLINE vi nearest(vf value) { return as<vi>(_mm256_cvtps_epi32(value)); }
DPK_INLINE vf rounded(vf value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__SSE2__)
DPK_INLINE vi nearest(vf value) { return as<vi>(_mm_cvtps_epi32(value)); }
DPK_INLINE vf rounded(vf value) { return __builtin_convertvector(nearest(value), vf); }
#else
DPK_INLINE vi nearest(vf value) {
  vi result;
  for (int i = 0; i < W; ++i) result[i] = int32_t(__builtin_nearbyintf(value[i]));
  return result;
}
DPK_INLINE vf rounded(vf value) { return __builtin_convertvector(nearest(value), vf); }
#endif

// 2^w, -126 <= w <= 0; a NaN stays one. The polynomial is within 2e-9 of 2^f on [-0.5, 0.5].
DPK_INLINE Lanes exp2_of(const Lanes& w) {
  Lanes scale, f;
  for (int i = 0; i < N; ++i) f.v[i] = w.v[i] - rounded(w.v[i]);
  for (int i = 0; i < N; ++i) scale.v[i] = as<vf>(vi((nearest(w.v[i]) << 23) + 0x3f800000));
  const Lanes f2 = f * f;
  const Lanes high = (9.618488958e-03f + f * 1.339993136e-03f) + f2 * 1.534581207e-04f;
  const Lanes value = (1.0f + f * 6.931472057e-01f) + f2 * ((2.402264689e-01f + f * 5.550328777e-02f) + f2 * high);
  return value * scale;
}

// |x| up to a limit beyond which q and p are 0 to float32; a NaN stays one.
DPK_INLINE Lanes magnitude(const Lanes& x, float limit) {
  Lanes t;
  for (int i = 0; i < N; ++i) t.v[i] = lesser(all(limit), as<vf>(vi(as<vi>(x.v[i]) & 0x7fffffff)));
  return t;
}

// x Phi(x). q = exp(-t^2 / 2) S(t), p = q - t phi(t). S(t) = erfcx(t / sqrt 2) / 2 is a polynomial in
// u = k t / (1 + k t), whose error, times that exponential, is at most 2e-8.
struct Gelu {
  static DPK_INLINE void rest(const Lanes& x, Lanes& t, Lanes& q, Lanes& p) {
    t = magnitude(x, 13.0f);
    const Lanes e = exp2_of(t * t * -7.2134752044e-01f);
    const Lanes scaled = t * 0.225f, u = scaled * (1.0f / (1.0f + scaled)), u2 = u * u;
    const Lanes upper = (3.165438535f + u * -3.575378835f) + u2 * (2.439480997f + u * -7.873284944e-01f);
    const Lanes s = (5.000000177e-01f + u * -1.773081955f) + u2 * upper;
    q = e * s;
    p = e * (s - t * 3.989422804e-01f);
  }
};

// q and p of x sigmoid(z), z >= 0: e / (1 + e) and q (1 - x z' / (1 + e)) with e = exp(-z).
DPK_INLINE void logistic(const Lanes& z, const Lanes& x_slope, Lanes& q, Lanes& p) {
  const Lanes e = exp2_of(z * -1.44269504089f);
  const Lanes r = 1.0f / (1.0f + e);
  q = e * r;
  p = q * (1.0f - x_slope * r);
}

// x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static DPK_INLINE void rest(const Lanes& x, Lanes& t, Lanes& q, Lanes& p) {
    constexpr float a = 1.59576912161f, b = 0.0713548162726f;
    t = magnitude(x, 9.5f);
    const Lanes t2 = t * t;
    logistic(t * (a + t2 * b), t * (a + t2 * (3.0f * b)), q, p);
  }
};

struct Silu {
  static DPK_INLINE void rest(const Lanes& x, Lanes& t, Lanes& q, Lanes& p) {
    t = magnitude(x, 87.0f);
    logistic(t, t, q, p);
  }
};

struct QuickGelu {
  static DPK_INLINE void rest(const Lanes& x, Lanes& t, Lanes& q, Lanes& p) {
    t = magnitude(x, 50.0f);
    const Lanes z = t * 1.702f;
    logistic(z, z, q, p);
  }
};

// By the sign of x; p is 0.5 at 0.
DPK_INLINE Lanes slope_at(const Lanes& x, const Lanes& p) {
  Lanes slope = 1.0f - p;
  for (int i = 0; i < N; ++i) {
#if defined(__AVX2__)
    slope.v[i] = _mm256_blendv_ps(slope.v[i], p.v[i], x.v[i]);
#else
    slope.v[i] = choose(as<vi>(x.v[i]) < 0, p.v[i], slope.v[i]);
#endif
  }
  return slope;
}

template <class T, class F>
void activation_grad(const void* from, const void* at, int64_t count, void* to) {
  const auto* grad = static_cast<const typename T::Item*>(from);
  const auto* x = static_cast<const typename T::Item*>(at);
  auto* out = static_cast<typename T::Item*>(to);
  const auto scaled = [](const Lanes& grad, const Lanes& x) __attribute__((always_inline)) {
    Lanes t, q, p;
    F::rest(x, t, q, p);
    return grad * slope_at(x, p);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) T::store(out + i, scaled(T::load(grad + i), T::load(x + i)));
  if (i < count) {
    const int64_t left = count - i;
    store_some<T>(out + i, scaled(load_some<T>(grad + i, left), load_some<T>(x + i, left)), left);
  }
}

constexpr float kSlopeSteps = 0x1p23f, kSlopeOffset = 0.5f;

struct Codes {
  vi v[N];
};

// Bytes 0, 1 and 2 of 16 codes to three planes.
DPK_INLINE void store_codes(uint8_t* to, int64_t stride, const Codes& codes) {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1, 0, 4, 8, 12, 1, 5, 9,
                                         13, 2, 6, 10, 14, -1, -1, -1, -1);
  const __m256i a = _mm256_shuffle_epi8(as<__m256i>(codes.v[0]), bytes);
  const __m256i b = _mm256_shuffle_epi8(as<__m256i>(codes.v[1]), bytes);
  // Codes 0-3 of a register lie in the lower half of its shuffle, 4-7 in the upper.
  const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
  const __m256i lower = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(a, b), order);
  const __m256i upper = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(a, b), order);
  dpk_store(to, _mm256_castsi256_si128(lower));
  dpk_store(to + stride, _mm256_extracti128_si256(lower, 1));
  dpk_store(to + 2 * stride, _mm256_castsi256_si128(upper));
#else
  for (int i = 0; i < N; ++i) {
    for (int lane = 0; lane < W; ++lane) {
      for (int k = 0; k < 3; ++k) to[k * stride + i * W + lane] = uint8_t(codes.v[i][lane] >> (8 * k));
    }
  }
#endif
}

template <class F>
void slope_pack(const float* x, int64_t count, float* y, uint8_t* to, int64_t stride) {
  const auto value = [](const Lanes& x, Lanes& y) __attribute__((always_inline)) {
    Lanes t, q, p;
    F::rest(x, t, q, p);
    const Lanes steps = slope_at(x, p) * kSlopeSteps;
    Codes codes;
    for (int i = 0; i < N; ++i) {
      y.v[i] = greater(x.v[i], vf{}) - t.v[i] * q.v[i];
      // Rounded before the offset is added, of which float32 would lose half a step. A NaN becomes code 0.
      const vf valid = greater(steps.v[i], all(-kSlopeOffset * kSlopeSteps));
      codes.v[i] = nearest(valid) + int32_t(kSlopeOffset * kSlopeSteps);
    }
    return codes;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes out;
    store_codes(to + i, stride, value(Float32::load(x + i), out));
    Float32::store(y + i, out);
  }
  if (i < count) {
    const int64_t left = count - i;
    Lanes out;
    uint8_t planes[3 * kLanes];
    store_codes(planes, kLanes, value(load_some<PlainFloat32>(x + i, left), out));
    store_some<PlainFloat32>(y + i, out, left);
    for (int k = 0; k < 3; ++k) __builtin_memcpy(to + k * stride + i, planes + k * kLanes, size_t(left));
  }
}

void slope_scale(const float* grad, const uint8_t* codes, int64_t stride, int64_t count, float* dx) {
  const auto scaled = [](Lanes grad, const uint8_t* codes, int64_t stride) __attribute__((always_inline)) {
    for (int i = 0; i < N; ++i) {
      const vi code = widen_unsigned(codes + i * W) | widen_unsigned(codes + stride + i * W) << 8 |
                      widen_unsigned(codes + 2 * stride + i * W) << 16;
      grad.v[i] = grad.v[i] * (__builtin_convertvector(code, vf) * (1.0f / kSlopeSteps) - kSlopeOffset);
    }
    return grad;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Float32::store(dx + i, scaled(Float32::load(grad + i), codes + i, stride));
  if (i < count) {
    const int64_t left = count - i;
    uint8_t planes[3 * kLanes] = {};
    for (int k = 0; k < 3; ++k) __builtin_memcpy(planes + k * kLanes, codes + k * stride + i, size_t(left));
    store_some<PlainFloat32>(dx + i, scaled(load_some<PlainFloat32>(grad + i, left), planes, kLanes), left);
  }
}
