// Vectors as the compiler's own vector types; W floats is the register of the width this file is compiled for.
// Loops are written for 16 float lanes (8 double lanes), whatever the register, so that every width adds in the
// same order and gives the same bits. Included by kernels.cpp only, inside the namespace of one width.

#if defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int kLanes = 16;
constexpr int N = kLanes / W;  // registers of 16 float lanes
constexpr int D = W / 2;       // doubles in a register

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vfd __attribute__((vector_size(4 * D)));
typedef uint32_t vud __attribute__((vector_size(4 * D)));
typedef double vd __attribute__((vector_size(8 * D)));
typedef int64_t vl __attribute__((vector_size(8 * D)));
typedef uint64_t vul __attribute__((vector_size(8 * D)));

#define DPK_INLINE inline __attribute__((always_inline))

template <class V>
DPK_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
DPK_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// Bits of one register read as another kind of lane.
template <class To, class From>
DPK_INLINE To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same register");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

DPK_INLINE vd splat(double value) { return value - vd{}; }

// Element types of a gradient: how W of them, or one, become float32. Exact for all three.
struct Float32 {
  typedef float Item;
  static DPK_INLINE vf vector(const Item* from) { return load<vf>(from); }
  static DPK_INLINE float scalar(Item value) { return value; }
};

struct BFloat16 {
  typedef uint16_t Item;
  static DPK_INLINE vf vector(const Item* from) {
    return as<vf>(vu(__builtin_convertvector(load<vh>(from), vu) << 16));
  }
  static DPK_INLINE float scalar(Item value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
  }
};

struct Float16 {
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
  static DPK_INLINE vf vector(const Item* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#else
  // As scalar, without branches. A subnormal half is an integer times 2^-24: float32 holds both exactly.
  static DPK_INLINE vf vector(const Item* from) {
    const vu half = __builtin_convertvector(load<vh>(from), vu);
    const vu exponent = (half >> 10) & 31u, mantissa = half & 1023u, sign = (half >> 15) << 31;
    const vu widened = as<vu>(vi(exponent == 31u)) & (255u << 23);
    const vu normal = (widened | ((exponent + 112u) << 23)) | (mantissa << 13);
    const vu subnormal = as<vu>(vf(__builtin_convertvector(as<vi>(mantissa), vf) * 0x1p-24f));
    const vu is_subnormal = as<vu>(vi(exponent == 0u));
    return as<vf>(vu(sign | (is_subnormal & subnormal) | (~is_subnormal & normal)));
  }
#endif
};

// 16 float lanes.
struct Lanes {
  vf v[N];

  DPK_INLINE Lanes operator+(const Lanes& other) const {
    Lanes sum;
    for (int i = 0; i < N; ++i) sum.v[i] = v[i] + other.v[i];
    return sum;
  }
};

template <class T>
DPK_INLINE Lanes load_lanes(const typename T::Item* from) {
  Lanes lanes;
  for (int i = 0; i < N; ++i) lanes.v[i] = T::vector(from + i * W);
  return lanes;
}

DPK_INLINE void store_lanes(float* to, const Lanes& lanes) {
  for (int i = 0; i < N; ++i) store(to + i * W, lanes.v[i]);
}

DPK_INLINE Lanes zero_lanes() {
  Lanes lanes;
  for (int i = 0; i < N; ++i) lanes.v[i] = vf{};
  return lanes;
}

// Sum of 16 values as a tree of depth four: the same bits on every width.
template <class Number>
DPK_INLINE Number tree_sum(Number (&values)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}
