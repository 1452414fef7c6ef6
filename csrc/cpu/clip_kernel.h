// Norms, the rounded sum of clipped rows, and its release.

// A square of a float32 is exact in float64. 16 lanes, whatever the width.
double sum_of_squares(const float* in, int64_t count) {
  constexpr int parts = kLanes / D;
  vd sums[parts] = {};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (int i = 0; i < parts; ++i) {
      const vd value = __builtin_convertvector(dpk_load<vfd>(in + c + i * D), vd);
      sums[i] += value * value;
    }
  }
  alignas(64) double lanes[kLanes];
  for (int i = 0; i < parts; ++i) dpk_store(lanes + i * D, sums[i]);
  for (int i = 0; c < count; ++c, ++i) lanes[i] += double(in[c]) * double(in[c]);
  double half[8];
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
  return tree_sum8(half);
}

// Adding 1.5 * 2^52 to |x| < 2^51 rounds it to an integer, which then stands in the low bits of the sum.
constexpr double kRounder = 0x1.8p52;
constexpr double kRoundable = 0x1p51;

// floor(x) as an integer, |x| < 2^51; any x where kAnyRange, what an int64 cannot hold becoming the smallest one.
DPK_INLINE vl floor_to_integer(vd x) {
#if defined(__AVX512F__)
  return as<vl>(_mm512_cvt_roundpd_epi64(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return as<vl>(vd(vd(_mm256_floor_pd(x)) + kRounder)) - as<vl>(splat(kRounder));
#else
  const vd nearest = (x + kRounder) - kRounder;
  const vl above = nearest > x;  // -1 where the nearest integer lies above x
  return (as<vl>(vd(nearest + kRounder)) - as<vl>(splat(kRounder))) + above;
#endif
}

// As torch converts: what an int64 cannot hold becomes the smallest one.
DPK_INLINE int64_t floor_to_integer(double x) {
  const double floored = __builtin_floor(x);
  return floored >= -0x1p63 && floored < 0x1p63 ? int64_t(floored) : INT64_MIN;
}

// Wraps instead of overflowing.
DPK_INLINE void add_to(int64_t& total, int64_t value) { total = int64_t(uint64_t(total) + uint64_t(value)); }

// The largest magnitude in a run of values; NaN is returned as something not below infinity.
DPK_INLINE float largest(const float* in, int64_t count) {
  vi high = {};
  int64_t c = 0;
  for (; c + W <= count; c += W) {
    const vi magnitude = dpk_load<vi>(in + c) & 0x7fffffff;
    high = magnitude > high ? magnitude : high;
  }
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits = high[i] > bits ? high[i] : bits;
  for (; c < count; ++c) {
    int32_t last;
    __builtin_memcpy(&last, in + c, 4);
    last &= 0x7fffffff;
    bits = last > bits ? last : bits;
  }
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The same of D elements: whether what leaves the range of floor_to_integer is converted as torch does.
#if defined(__AVX512F__)
constexpr bool kAnyRange = true;
#else
constexpr bool kAnyRange = false;
#endif
DPK_INLINE void add_rounded(int64_t* total, vfd in, vd factor) {
  const vd scaled = __builtin_convertvector(in, vd) * factor;
  dpk_store(total, vl(dpk_load<vl>(total) + floor_to_integer(vd(scaled + 0.5))));
}

void add_rounded(int64_t* total, const float* in, int64_t count, double factor) {
  constexpr int64_t run = 512;  // its second reading comes from the first-level cache
  for (int64_t start = 0; start < count; start += run) {
    const int64_t end = count - start < run ? count : start + run;
    int64_t c = start;
    if (kAnyRange || double(largest(in + start, end - start)) * __builtin_fabs(factor) < kRoundable - 1.0) {
      for (; c + D <= end; c += D) add_rounded(total + c, dpk_load<vfd>(in + c), splat(factor));
    }
    for (; c < end; ++c) add_to(total[c], floor_to_integer(double(in[c]) * factor + 0.5));
  }
}

// An integer of |value| < 2^51 as float64, exactly.
DPK_INLINE vd to_double(vl value) { return as<vd>(vl(value + as<vl>(splat(kRounder)))) - kRounder; }

void add_noise(float* out, const int64_t* total, const double* z, int64_t count, double noise_std, double scale) {
  int64_t c = 0;
  vl outside = {};  // stays 0 where all sums are below 2^50
  for (; c + D <= count; c += D) {
    const vl sum = dpk_load<vl>(total + c) + floor_to_integer(vd(dpk_load<vd>(z + c) * noise_std + 0.5));
    outside |= vl(sum + (int64_t(1) << 50)) & ~vl(vl{} + ((int64_t(1) << 51) - 1));
    dpk_store(out + c, __builtin_convertvector(vd(to_double(sum) * scale), vfd));
  }
  int64_t any = 0;
  for (int i = 0; i < D; ++i) any |= outside[i];
  for (c = any == 0 ? c : 0; c < count; ++c) {
    int64_t sum = total[c];
    add_to(sum, floor_to_integer(noise_std * z[c] + 0.5));
    out[c] = float(double(sum) * scale);
  }
}
