// Bits, bit planes and what they scale. 16 elements are two bytes of bits.

void pack_bits(const void* mask, int64_t count, uint8_t* bits) {
  const auto* in = static_cast<const uint8_t*>(mask);
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    const __m256i zero = _mm256_cmpeq_epi8(dpk_load<__m256i>(in + i), _mm256_setzero_si256());
    dpk_store(bits + i / 8, ~uint32_t(_mm256_movemask_epi8(zero)));
  }
#elif defined(__SSE2__)
  for (; i + 16 <= count; i += 16) {
    const __m128i zero = _mm_cmpeq_epi8(dpk_load<__m128i>(in + i), _mm_setzero_si128());
    dpk_store(bits + i / 8, uint16_t(~_mm_movemask_epi8(zero)));
  }
#endif
  for (; i < count; i += 8) {
    uint32_t byte = 0;
    for (int64_t k = i; k < i + 8 && k < count; ++k) byte |= uint32_t(in[k] != 0) << (k - i);
    bits[i / 8] = uint8_t(byte);
  }
}

template <class T, bool leaky>
DPK_INLINE void clamp_and_pack(const void* from, int64_t count, const ClampLimits& limits, void* to, uint8_t* bits) {
  const auto* in = static_cast<const typename T::Item*>(from);
  auto* out = static_cast<typename T::Item*>(to);
  const vf low = all(limits.low), high = all(limits.high), slope = all(limits.slope);
  const vf low_value = T::round(low), high_value = T::round(high);
  const auto clamp = [&](const Lanes& x, Lanes& y) __attribute__((always_inline)) {
    Masks outside;
    for (int i = 0; i < N; ++i) {
      const vi below = x.v[i] <= low, above = x.v[i] >= high;
      y.v[i] = choose(above, high_value, choose(below, leaky ? vf(x.v[i] * slope) : low_value, x.v[i]));
      outside.v[i] = below | above;
    }
    return ~gather_bits(outside);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes y;
    const uint32_t between = clamp(T::load(in + i), y);
    if (leaky) {
      T::store(out + i, y);
    } else {
      T::store_exact(out + i, y);
    }
    dpk_store(bits + i / 8, uint16_t(between));
  }
  if (i < count) {
    Lanes y;
    const uint32_t between = clamp(load_some<T>(in + i, count - i), y) & ((1u << (count - i)) - 1u);
    store_some<T>(out + i, y, count - i);
    store_some_bits(bits + i / 8, between, count - i);
  }
}

template <class T>
void clamp_pack(const void* x, int64_t count, const ClampLimits& limits, void* y, uint8_t* bits) {
  if (limits.slope != 0.0f) {
    clamp_and_pack<T, true>(x, count, limits, y, bits);
  } else {
    clamp_and_pack<T, false>(x, count, limits, y, bits);
  }
}

// 16 items of two bytes, those whose bit is off as 0: what a ReLU passes back needs no arithmetic.
DPK_INLINE void keep_where(const uint16_t* from, uint32_t set, uint16_t* to) {
  typedef uint16_t vhs __attribute__((vector_size(4 * W)));
  vhs place;
  for (int i = 0; i < 2 * W; ++i) place[i] = uint16_t(1u << i);
  for (int i = 0; i < kLanes; i += 2 * W) {
    const vhs own = (vhs{} + uint16_t(set >> i)) & place;
    dpk_store(to + i, vhs(dpk_load<vhs>(from + i) & vhs(own == place)));
  }
}

template <class T>
void bit_scale(const void* from, const uint8_t* bits, int64_t first, int64_t count, float on, float off, void* to) {
  const auto* in = static_cast<const typename T::Item*>(from);
  auto* out = static_cast<typename T::Item*>(to);
  const auto scaled = [&](const Lanes& x, uint32_t set) __attribute__((always_inline)) {
    const Masks mask = spread(set);
    Lanes y;
    for (int i = 0; i < N; ++i) {
      // An off of 0 selects 0, whatever x holds.
      y.v[i] = off == 0.0f ? as<vf>(vi(as<vi>(vf(x.v[i] * on)) & mask.v[i]))
                           : x.v[i] * choose(mask.v[i], all(on), all(off));
    }
    return y;
  };
  int64_t i = 0;
  if constexpr (sizeof(typename T::Item) == 2) {
    if (on == 1.0f && off == 0.0f) {
      for (; i + kLanes <= count; i += kLanes) keep_where(in + i, load_bits(bits, first + i), out + i);
    }
  }
  for (; i + kLanes <= count; i += kLanes) T::store(out + i, scaled(T::load(in + i), load_bits(bits, first + i)));
  if (i < count) {
    const uint32_t set = load_some_bits(bits, first + i, count - i);
    store_some<T>(out + i, scaled(load_some<T>(in + i, count - i), set), count - i);
  }
}

template <class T>
void level_pack(const void* from, const float* edges, int64_t count, uint8_t* planes, int64_t stride) {
  const auto* in = static_cast<const typename T::Item*>(from);
  const auto codes = [&](const Lanes& x, uint32_t (&plane)[3]) __attribute__((always_inline)) {
    plane[0] = plane[1] = plane[2] = 0;
    for (int i = 0; i < N; ++i) {
      vi below = {};  // minus the number of edges below
      for (int edge = 0; edge < 7; ++edge) below += x.v[i] > all(edges[edge]);
      const vi code = -below;
      for (int k = 0; k < 3; ++k) plane[k] |= signs(code << (31 - k)) << (i * W);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    uint32_t plane[3];
    codes(T::load(in + i), plane);
    for (int k = 0; k < 3; ++k) dpk_store(planes + k * stride + i / 8, uint16_t(plane[k]));
  }
  if (i < count) {
    uint32_t plane[3];
    codes(load_some<T>(in + i, count - i), plane);
    for (int k = 0; k < 3; ++k) {
      store_some_bits(planes + k * stride + i / 8, plane[k] & ((1u << (count - i)) - 1u), count - i);
    }
  }
}

// 16 of eight levels, by three bits each.
struct Levels {
#if defined(__AVX2__)
  __m256 value;
  DPK_INLINE explicit Levels(const float* levels) : value(dpk_load<__m256>(levels)) {}
  DPK_INLINE Lanes at(uint32_t low, uint32_t middle, uint32_t high) const {
    Lanes lanes;
    for (int i = 0; i < N; ++i) {
      const int half = i * W;
      const uint32_t word = (low >> half & 255u) | (middle >> half & 255u) << 8 | (high >> half & 255u) << 16;
      // Bits 0, 8 and 16 of each lane are its own; the permutation looks at the lowest three.
      const vu own = (vu{} + word) >> as<vu>(lane_numbers()) & 0x010101u;
      lanes.v[i] = _mm256_permutevar8x32_ps(value, as<__m256i>(vu(own | own >> 7 | own >> 14)));
    }
    return lanes;
  }
#else
  vf value[8];
  DPK_INLINE explicit Levels(const float* levels) {
    for (int i = 0; i < 8; ++i) value[i] = all(levels[i]);
  }
  DPK_INLINE Lanes at(uint32_t low, uint32_t middle, uint32_t high) const {
    const Masks a = spread(low), b = spread(middle), c = spread(high);
    Lanes lanes;
    for (int i = 0; i < N; ++i) {
      vf pair[4];
      for (int k = 0; k < 4; ++k) pair[k] = choose(a.v[i], value[2 * k + 1], value[2 * k]);
      lanes.v[i] = choose(c.v[i], choose(b.v[i], pair[3], pair[2]), choose(b.v[i], pair[1], pair[0]));
    }
    return lanes;
  }
#endif
};

template <class T>
void level_scale(const void* from, const uint8_t* planes, int64_t stride, int64_t first, int64_t count,
                 const float* values, void* to) {
  const auto* in = static_cast<const typename T::Item*>(from);
  auto* out = static_cast<typename T::Item*>(to);
  const uint8_t *low = planes, *middle = planes + stride, *high = planes + 2 * stride;
  const Levels levels(values);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const int64_t at = first + i;
    const Lanes level = levels.at(load_bits(low, at), load_bits(middle, at), load_bits(high, at));
    T::store(out + i, T::load(in + i) * level);
  }
  if (i < count) {
    const int64_t at = first + i, left = count - i;
    const Lanes level = levels.at(load_some_bits(low, at, left), load_some_bits(middle, at, left),
                                  load_some_bits(high, at, left));
    store_some<T>(out + i, load_some<T>(in + i, left) * level, left);
  }
}

template <class T>
void scale_by(const void* from, const float* scale, int64_t count, void* to) {
  const auto* in = static_cast<const typename T::Item*>(from);
  auto* out = static_cast<typename T::Item*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) T::store(out + i, T::load(in + i) * Float32::load(scale + i));
  if (i < count) {
    const Lanes factor = load_some<PlainFloat32>(scale + i, count - i);
    store_some<T>(out + i, load_some<T>(in + i, count - i) * factor, count - i);
  }
}

template <class T>
void scale_all(const void* from, float factor, int64_t count, void* to) {
  const auto* in = static_cast<const typename T::Item*>(from);
  auto* out = static_cast<typename T::Item*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) T::store(out + i, T::load(in + i) * factor);
  if (i < count) store_some<T>(out + i, load_some<T>(in + i, count - i) * factor, count - i);
}
