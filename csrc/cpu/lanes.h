// 16 float lanes in registers of at most 8, element types of a gradient, and sums over lanes. Included by kernels.cpp and
// kernels_backward.cpp, after vector.h.

constexpr int N = kLanes / W;  // registers of 16 float lanes

// 16 float lanes.
struct Lanes {
  vf v[N];

  DPK_INLINE Lanes operator+(const Lanes& other) const {
    Lanes sum;
    for (int i = 0; i < N; ++i) sum.v[i] = v[i] + other.v[i];
    return sum;
  }
};

// Eight float lanes, the halves of Lanes added.
struct HalfLanes {
  vf v[N / 2];
};

DPK_INLINE Lanes zero_lanes() {
  Lanes lanes;
  for (int i = 0; i < N; ++i) lanes.v[i] = vf{};
  return lanes;
}

// Element types of a gradient. load: 16 neighbours as float32, exactly, in the type's own order of lanes; load_last
// zeroes all but the last `count` of them; store undoes the order; fold adds 16 lanes to eight, by a rule that names
// the same neighbours on every width.
struct Float32 {
  typedef float Item;
  static DPK_INLINE float scalar(Item value) { return value; }
  static DPK_INLINE Lanes load(const Item* from) {
    Lanes lanes;
    for (int i = 0; i < N; ++i) lanes.v[i] = dpk_load<vf>(from + i * W);
    return lanes;
  }
  static DPK_INLINE Lanes load_last(const Item* from, int64_t count) {
    static const int32_t mask[2 * kLanes] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                             -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    Lanes lanes;
    for (int i = 0; i < N; ++i) {
      lanes.v[i] = as<vf>(vi(dpk_load<vi>(from + i * W) & dpk_load<vi>(mask + count + i * W)));
    }
    return lanes;
  }
  static DPK_INLINE void store(float* to, const Lanes& lanes) {
    for (int i = 0; i < N; ++i) dpk_store(to + i * W, lanes.v[i]);
  }
  static DPK_INLINE HalfLanes fold(const Lanes& lanes) {
    HalfLanes half;
    for (int i = 0; i < N / 2; ++i) half.v[i] = lanes.v[i] + lanes.v[i + N / 2];
    return half;
  }
};

static const int16_t kLast16[2 * kLanes] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                            -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

// A bfloat16 is the upper half of a float32. A register of them, read as 32-bit lanes, holds the even ones in the lower
// and the odd ones in the upper half of each lane (little endian): a shift and a mask make two registers of floats.
struct BFloat16 {
  typedef uint16_t Item;
  static DPK_INLINE float scalar(Item value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
  }
  static DPK_INLINE void split(vu pairs, vf& even, vf& odd) {
    even = as<vf>(vu(pairs << 16));
    odd = as<vf>(vu(pairs & 0xffff0000u));
  }
  static DPK_INLINE Lanes load(const Item* from) {
    Lanes lanes;
    for (int i = 0; i < N; i += 2) split(dpk_load<vu>(from + i * W), lanes.v[i], lanes.v[i + 1]);
    return lanes;
  }
  static DPK_INLINE Lanes load_last(const Item* from, int64_t count) {
    Lanes lanes;
    for (int i = 0; i < N; i += 2) {
      split(dpk_load<vu>(from + i * W) & dpk_load<vu>(kLast16 + count + i * W), lanes.v[i], lanes.v[i + 1]);
    }
    return lanes;
  }
  static DPK_INLINE void store(float* to, const Lanes& lanes) {
    for (int i = 0; i < N; ++i) {
      for (int lane = 0; lane < W; ++lane) to[(i / 2) * 2 * W + 2 * lane + i % 2] = lanes.v[i][lane];
    }
  }
  static DPK_INLINE HalfLanes fold(const Lanes& lanes) {
    HalfLanes half;
    for (int i = 0; i < N / 2; ++i) half.v[i] = lanes.v[2 * i] + lanes.v[2 * i + 1];
    return half;
  }
};

struct Float16 : Float32 {
  typedef uint16_t Item;
  static DPK_INLINE float scalar(Item value) {
    const uint32_t exponent = (value >> 10) & 31u, mantissa = value & 1023u, sign = uint32_t(value >> 15) << 31;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float(mantissa) * 0x1p-24f);
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
  }
#if defined(__F16C__)
  static DPK_INLINE vf widen(vh half) { return _mm256_cvtph_ps(as<__m128i>(half)); }
#else
  // As scalar, without branches. A subnormal half is an integer times 2^-24: float32 holds both exactly.
  static DPK_INLINE vf widen(vh item) {
    const vu half = __builtin_convertvector(item, vu);
    const vu exponent = (half >> 10) & 31u, mantissa = half & 1023u, sign = (half >> 15) << 31;
    const vu special = as<vu>(vi(exponent == 31u)) & (255u << 23);
    const vu normal = (special | ((exponent + 112u) << 23)) | (mantissa << 13);
    const vu subnormal = as<vu>(vf(__builtin_convertvector(as<vi>(mantissa), vf) * 0x1p-24f));
    const vu is_subnormal = as<vu>(vi(exponent == 0u));
    return as<vf>(vu(sign | (is_subnormal & subnormal) | (~is_subnormal & normal)));
  }
#endif
  static DPK_INLINE Lanes load(const Item* from) {
    Lanes lanes;
    for (int i = 0; i < N; ++i) lanes.v[i] = widen(dpk_load<vh>(from + i * W));
    return lanes;
  }
  static DPK_INLINE Lanes load_last(const Item* from, int64_t count) {
    Lanes lanes;
    for (int i = 0; i < N; ++i) {
      lanes.v[i] = widen(dpk_load<vh>(from + i * W) & dpk_load<vh>(kLast16 + count + i * W));
    }
    return lanes;
  }
};

// tree_sum8 of each of eight.
DPK_INLINE void tree_sums8(const HalfLanes (&half)[8], float (&sums)[8]) {
#if defined(__AVX2__)
  const auto four = [&](int i) __attribute__((always_inline)) {
    return _mm256_hadd_ps(_mm256_hadd_ps(half[i].v[0], half[i + 1].v[0]),
                          _mm256_hadd_ps(half[i + 2].v[0], half[i + 3].v[0]));
  };
  const __m256 a = four(0), b = four(4);
  dpk_store(sums, vf(_mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31)));
#else
  for (int i = 0; i < 8; ++i) {
    float lane[8];
    for (int part = 0; part < N / 2; ++part) dpk_store(lane + part * W, half[i].v[part]);
    sums[i] = tree_sum8(lane);
  }
#endif
}
