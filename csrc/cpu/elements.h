// Element types as 16 float lanes in the order of memory, with a store that rounds once: what turns one tensor into
// another needs its neighbours in order (bits, weights), where sums alone do not (vector.h).

// A lane mask is all ones or all zeros.
DPK_INLINE vf choose(vi mask, vf yes, vf no) { return mask ? yes : no; }
DPK_INLINE vf all(float value) { return value - vf{}; }

// The lesser and the greater; where one is a NaN, the second.
#if defined(__AVX2__)
DPK_INLINE vf lesser(vf a, vf b) { return _mm256_min_ps(a, b); }
DPK_INLINE vf greater(vf a, vf b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE2__)
DPK_INLINE vf lesser(vf a, vf b) { return _mm_min_ps(a, b); }
DPK_INLINE vf greater(vf a, vf b) { return _mm_max_ps(a, b); }
#else
DPK_INLINE vf lesser(vf a, vf b) { return a < b ? a : b; }
DPK_INLINE vf greater(vf a, vf b) { return a > b ? a : b; }
#endif

// The operators of a register for all 16 lanes: one step of every register after the other, so that a long chain of
// steps does not wait for itself.
DPK_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
  Lanes result;
  for (int i = 0; i < N; ++i) result.v[i] = a.v[i] - b.v[i];
  return result;
}
DPK_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes result;
  for (int i = 0; i < N; ++i) result.v[i] = a.v[i] * b.v[i];
  return result;
}
DPK_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
  Lanes result;
  for (int i = 0; i < N; ++i) result.v[i] = a.v[i] / b.v[i];
  return result;
}
DPK_INLINE Lanes sixteen(float value) {
  Lanes result;
  for (int i = 0; i < N; ++i) result.v[i] = all(value);
  return result;
}
DPK_INLINE Lanes operator+(const Lanes& a, float b) { return a + sixteen(b); }
DPK_INLINE Lanes operator+(float a, const Lanes& b) { return sixteen(a) + b; }
DPK_INLINE Lanes operator-(const Lanes& a, float b) { return a - sixteen(b); }
DPK_INLINE Lanes operator-(float a, const Lanes& b) { return sixteen(a) - b; }
DPK_INLINE Lanes operator*(const Lanes& a, float b) { return a * sixteen(b); }
DPK_INLINE Lanes operator/(float a, const Lanes& b) { return sixteen(a) / b; }

// store_exact is store for values that are of the type already, which round makes.
struct PlainFloat32 {
  typedef float Item;
  static DPK_INLINE Lanes load(const Item* from) { return Float32::load(from); }
  static DPK_INLINE void store(Item* to, const Lanes& lanes) { Float32::store(to, lanes); }
  static DPK_INLINE void store_exact(Item* to, const Lanes& lanes) { store(to, lanes); }
  static DPK_INLINE vf round(vf value) { return value; }
};

DPK_INLINE vh narrow(vu value) { return __builtin_convertvector(value, vh); }

struct PlainBFloat16 {
  typedef uint16_t Item;
  static DPK_INLINE Lanes load(const Item* from) {
    Lanes lanes;
    for (int i = 0; i < N; ++i) {
      lanes.v[i] = as<vf>(vu(__builtin_convertvector(dpk_load<vh>(from + i * W), vu) << 16));
    }
    return lanes;
  }
  // To nearest, ties to even; a NaN stays one.
  static DPK_INLINE vu rounded(vf value) {
    const vu bits = as<vu>(value);
    const vu nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value == value ? nearest : vu{} + 0x7fc0u;
  }
  static DPK_INLINE void store_halves(Item* to, const vu (&halves)[N]) {
#if defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32(as<__m256i>(halves[0]), as<__m256i>(halves[1]));
    dpk_store(to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
    for (int i = 0; i < N; ++i) dpk_store(to + i * W, narrow(halves[i]));
#endif
  }
  static DPK_INLINE void store(Item* to, const Lanes& lanes) {
    vu halves[N];
    for (int i = 0; i < N; ++i) halves[i] = rounded(lanes.v[i]);
    store_halves(to, halves);
  }
  static DPK_INLINE void store_exact(Item* to, const Lanes& lanes) {
    vu halves[N];
    for (int i = 0; i < N; ++i) halves[i] = as<vu>(lanes.v[i]) >> 16;
    store_halves(to, halves);
  }
  static DPK_INLINE vf round(vf value) { return as<vf>(vu(rounded(value) << 16)); }
};

struct PlainFloat16 {
  typedef uint16_t Item;
  static DPK_INLINE Lanes load(const Item* from) { return Float16::load(from); }
#if defined(__F16C__)
  static DPK_INLINE vh rounded(vf value) { return as<vh>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)); }
#else
  // As the instruction: a result below 2^-14 has its last place at 2^-24, which is that of a float32 next to 0.5.
  static DPK_INLINE vh rounded(vf value) {
    const vu bits = as<vu>(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const vu small = as<vu>(vf(as<vf>(magnitude) + 0.5f)) - as<vu>(all(0.5f));
    const vu is_small = as<vu>(vi(as<vi>(magnitude) < (113 << 23)));
    const vu is_large = as<vu>(vi(as<vi>(magnitude) >= 0x477ff000));  // 65520: half way beyond the largest
    const vu is_nan = as<vu>(vi(as<vi>(magnitude) > 0x7f800000));
    vu half = (is_small & small) | (~is_small & normal);
    half = (is_large & 0x7c00u) | (~is_large & half);
    half = half | (is_nan & (0x200u | ((magnitude >> 13) & 0x3ffu)));
    return narrow(half | sign);
  }
#endif
  static DPK_INLINE void store(Item* to, const Lanes& lanes) {
    for (int i = 0; i < N; ++i) dpk_store(to + i * W, rounded(lanes.v[i]));
  }
  static DPK_INLINE void store_exact(Item* to, const Lanes& lanes) { store(to, lanes); }
  static DPK_INLINE vf round(vf value) { return value; }
};

// Bytes as integers. Generic conversions from registers this short go lane by lane.
DPK_INLINE vi widen_unsigned(const uint8_t* from) {
#if defined(__AVX2__)
  return as<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(dpk_load<int32_t>(from));
  return as<vi>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero));
#else
  typedef uint8_t vb __attribute__((vector_size(W)));
  return __builtin_convertvector(dpk_load<vb>(from), vi);
#endif
}

struct Int8 {
  typedef int8_t Item;
  static DPK_INLINE Lanes load(const Item* from) {
    Lanes lanes;
    for (int i = 0; i < N; ++i) {
      const vi number = (widen_unsigned(reinterpret_cast<const uint8_t*>(from) + i * W) << 24) >> 24;
      lanes.v[i] = __builtin_convertvector(number, vf);
    }
    return lanes;
  }
  // Of integers from -128 to 127.
  static DPK_INLINE void store(Item* to, const vi (&numbers)[N]) {
#if defined(__AVX2__)
    const __m256i words = _mm256_packs_epi32(as<__m256i>(numbers[0]), as<__m256i>(numbers[1]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    dpk_store(to, _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words), order)));
#elif defined(__SSE2__)
    const __m128i low = _mm_packs_epi32(as<__m128i>(numbers[0]), as<__m128i>(numbers[1]));
    const __m128i high = _mm_packs_epi32(as<__m128i>(numbers[2]), as<__m128i>(numbers[3]));
    dpk_store(to, _mm_packs_epi16(low, high));
#else
    for (int i = 0; i < N; ++i) {
      for (int lane = 0; lane < W; ++lane) to[i * W + lane] = int8_t(numbers[i][lane]);
    }
#endif
  }
};

// The last `count` < 16 items of a tensor through a buffer of 16, so that they take the same way as all others.
template <class T>
DPK_INLINE Lanes load_some(const typename T::Item* from, int64_t count) {
  typename T::Item items[kLanes] = {};
  __builtin_memcpy(items, from, size_t(count) * sizeof(typename T::Item));
  return T::load(items);
}

// `count` items as float32; out has room for whole vectors.
template <class T>
DPK_INLINE void widen_all(const typename T::Item* from, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Float32::store(out + i, T::load(from + i));
  if (i < count) Float32::store(out + i, load_some<T>(from + i, count - i));
}

template <class T>
DPK_INLINE void store_some(typename T::Item* to, const Lanes& lanes, int64_t count) {
  typename T::Item items[kLanes];
  T::store(items, lanes);
  __builtin_memcpy(to, items, size_t(count) * sizeof(typename T::Item));
}

// The first `count` lanes; the others become 0.
DPK_INLINE Lanes keep_first(const Lanes& lanes, int64_t count) {
  alignas(64) float items[kLanes] = {}, kept[kLanes] = {};
  Float32::store(items, lanes);
  __builtin_memcpy(kept, items, size_t(count) * sizeof(float));
  return Float32::load(kept);
}

// 16 bits from bit `first` on, all of which exist.
DPK_INLINE uint32_t load_bits(const uint8_t* bits, int64_t first) {
  const uint8_t* from = bits + first / 8;
  const unsigned shift = unsigned(first) & 7u;
  uint16_t low;
  __builtin_memcpy(&low, from, 2);
  if (shift == 0) return low;
  return ((uint32_t(low) | uint32_t(from[2]) << 16) >> shift) & 0xffffu;
}

// `count` < 16 bits from bit `first` on.
DPK_INLINE uint32_t load_some_bits(const uint8_t* bits, int64_t first, int64_t count) {
  uint32_t value = 0;
  for (int64_t i = 0; i < count; ++i) value |= uint32_t(bits[(first + i) / 8] >> ((first + i) & 7) & 1) << i;
  return value;
}

DPK_INLINE void store_some_bits(uint8_t* bits, uint32_t value, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) bits[i / 8] = uint8_t(value >> i);
}

// 16 bits as lane masks, and back: bit i is lane i.
struct Masks {
  vi v[N];
};

DPK_INLINE vi lane_numbers() {
  vi numbers;
  for (int i = 0; i < W; ++i) numbers[i] = i;
  return numbers;
}

DPK_INLINE Masks spread(uint32_t bits) {
  vi place;
  for (int i = 0; i < W; ++i) place[i] = 1 << i;
  Masks masks;
  for (int i = 0; i < N; ++i) {
    const vi all_bits = vi{} + int32_t(bits >> (i * W));
    masks.v[i] = (all_bits & place) == place;
  }
  return masks;
}

// Signs of the lanes.
DPK_INLINE uint32_t signs(vi lanes) {
#if defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(as<__m256>(lanes)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(as<__m128>(lanes)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(lanes[i] < 0) << i;
  return bits;
#endif
}

DPK_INLINE uint32_t gather_bits(const Masks& masks) {
  uint32_t bits = 0;
  for (int i = 0; i < N; ++i) bits |= signs(masks.v[i]) << (i * W);
  return bits;
}
