// Box-Muller in float64 on two 64-bit words: z = sqrt(-2 ln u) * cos or sin(2 pi angle); u has 76 bits, the first word
// and the 12 low bits of the second, the angle has the other 52. Multiply and add stay apart (no contraction), and
// logarithm, sine and cosine are defined here by their polynomials (fdlibm's e_log.c, k_sin.c, k_cos.c), so that every
// backend gives the same bits. Only square root and division are borrowed: IEEE defines theirs. Worked example: words
// (2^64 - 1, 2^12 - 1) give ln 1 = 0 and so z = 0; words (0, 0) give z = sqrt(152 ln 2) = 10.26, the largest there is.

typedef Four<vd> Numbers;
typedef Four<vul> Words;

// An integer below 2^32 in each 64-bit lane, as float64, exactly.
DPK_INLINE Numbers small_to_double(const Words& value) { return as<vd>(value | 0x4330000000000000u) - 0x1p52; }

// high * 2^32 + low, correctly rounded: both terms are exact, the addition rounds once.
DPK_INLINE Numbers to_double(const Words& high, const Words& low) {
  return small_to_double(high) * 0x1p32 + small_to_double(low);
}

// ln u for u = (2^12 word + low + 1) / 2^76, word = high * 2^32 + rest. From 3/4 on it is taken of 1 - (1 - u): the
// distance from 1 keeps its relative precision, and with it the small radii theirs.
DPK_INLINE Numbers log_uniform(const Words& high, const Words& rest, const Words& low) {
  const Words near = 0u - ((high >> 31) & (high >> 30) & 1u);
  const Words flip = near & 0xffffffffu;
  const Words tail = (near & (0xfffu - low)) | (~near & (low + 1u));
  const Numbers v = (to_double(high ^ flip, rest ^ flip) + small_to_double(tail) * 0x1p-12) * 0x1p-64;
  const Words bits = as<vul>(v);
  Numbers mantissa = as<vd>((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u);  // [1, 2)
  Numbers exponent = small_to_double(bits >> 52) - 1023.0;
  const Four<vl> upper = at_least(mantissa, 1.4142135623730951);
  mantissa = select(upper, mantissa * 0.5, mantissa);
  exponent = select(upper, exponent + 1.0, exponent);

  exponent = as<vd>(as<vul>(exponent) & ~near);
  const Numbers g = select(as<vl>(near), -v, mantissa - 1.0);
  const Numbers q = g / (g + 2.0);
  const Numbers w = q * q;
  const Numbers series =
      w * (w * (w * (w * (w * (w * (w * 1.479819860511658591e-01 + 1.531383769920937332e-01) +
                               1.818357216161805012e-01) +
                          2.222219843214978396e-01) +
                     2.857142874366239149e-01) +
                3.999999999940941908e-01) +
           6.666666666666735130e-01);
  const Numbers h = (g * 0.5) * g;
  return exponent * 6.93147180369123816490e-01 -
         ((h - (q * (h + series) + exponent * 1.90821492927058770002e-10)) - g);
}

// Sine and cosine of 2 pi a / 2^52, a the upper 52 bits of the word high * 2^32 + low: the top three bits are the
// octant, the rest is the place in it, counted from its even edge.
DPK_INLINE void sine_cosine(const Words& high, const Words& low, Numbers& sine, Numbers& cosine) {
  const Words octant = high >> 29;
  const Words place = ((high & 0x1fffffffu) << 32) | (low & 0xfffff000u);
  const Words odd = 0u - (octant & 1u);
  const Words folded = (odd & ((1ull << 61) - place)) | (~odd & place);
  const Numbers x = (to_double(folded >> 32, folded & 0xffffffffu) * 0x1p-61) * 0.78539816339744830962;
  const Numbers z = x * x;

  const Numbers s = x + (x * z) * (-1.66666666666666324348e-01 +
                              z * (8.33333333332248946124e-03 +
                                   z * (-1.98412698298579493134e-04 +
                                        z * (2.75573137070700676789e-06 +
                                             z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const Numbers c = (1.0 - z * 0.5) +
               (z * z) * (4.16666666666666019037e-02 +
                          z * (-1.38888888888741095749e-03 +
                               z * (2.48015872894767294178e-05 +
                                    z * (-2.75573143513906633035e-07 +
                                         z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  // Octants 1, 2, 5, 6 swap; 2 to 5 have a negative cosine, 4 to 7 a negative sine.
  const Four<vl> swap = as<vl>(0u - (((octant + 1u) >> 1) & 1u));
  const Words negative_cosine = (((octant + 2u) >> 2) & 1u) << 63;
  const Words negative_sine = (octant >> 2) << 63;
  sine = as<vd>(as<vul>(select(swap, c, s)) ^ negative_sine);
  cosine = as<vd>(as<vul>(select(swap, s, c)) ^ negative_cosine);
}

// even.v[i] and odd.v[i] hold elements 2 i and 2 i + 1 of D blocks: to out[8 * block + element].
DPK_INLINE void store_blocks(double* out, const Numbers& even, const Numbers& odd) {
#if defined(__AVX512F__)
  __m512d pair[8], four[8];  // lane pairs: of pair[2 i] elements 2 i, 2 i + 1 of the even blocks, of pair[2 i + 1] the odd
  for (int i = 0; i < 4; ++i) {
    pair[2 * i] = _mm512_unpacklo_pd(even.v[i], odd.v[i]), pair[2 * i + 1] = _mm512_unpackhi_pd(even.v[i], odd.v[i]);
  }
  for (int i = 0; i < 2; ++i) {  // of the even blocks (i = 0) or the odd: their elements 0 to 3 and 4 to 7
    four[4 * i] = _mm512_shuffle_f64x2(pair[i], pair[i + 2], 0x44);
    four[4 * i + 1] = _mm512_shuffle_f64x2(pair[i], pair[i + 2], 0xee);
    four[4 * i + 2] = _mm512_shuffle_f64x2(pair[i + 4], pair[i + 6], 0x44);
    four[4 * i + 3] = _mm512_shuffle_f64x2(pair[i + 4], pair[i + 6], 0xee);
    for (int half = 0; half < 2; ++half) {
      const __m512d a = four[4 * i + half], b = four[4 * i + 2 + half];
      dpk_store(out + 8 * (4 * half + i), _mm512_shuffle_f64x2(a, b, 0x88));
      dpk_store(out + 8 * (4 * half + 2 + i), _mm512_shuffle_f64x2(a, b, 0xdd));
    }
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 4; i += 2) {
    const __m256d a = _mm256_unpacklo_pd(even.v[i], odd.v[i]), b = _mm256_unpackhi_pd(even.v[i], odd.v[i]);
    const __m256d c = _mm256_unpacklo_pd(even.v[i + 1], odd.v[i + 1]);
    const __m256d d = _mm256_unpackhi_pd(even.v[i + 1], odd.v[i + 1]);
    dpk_store(out + 2 * i, _mm256_permute2f128_pd(a, c, 0x20));
    dpk_store(out + 8 + 2 * i, _mm256_permute2f128_pd(b, d, 0x20));
    dpk_store(out + 16 + 2 * i, _mm256_permute2f128_pd(a, c, 0x31));
    dpk_store(out + 24 + 2 * i, _mm256_permute2f128_pd(b, d, 0x31));
  }
#else
  for (int lane = 0; lane < D; ++lane) {
    for (int i = 0; i < 4; ++i) {
      out[8 * lane + 2 * i] = even.v[i][lane];
      out[8 * lane + 2 * i + 1] = odd.v[i][lane];
    }
  }
#endif
}

// One block gives eight normals: words 0 and 1 the first two (cosine, sine), words 2 and 3 the next. Room for a multiple
// of W blocks.
void normals(double* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks) {
  for (int64_t block = 0; block < blocks; block += W) {
    const ChaChaBlocks made = chacha20_blocks(input, uint32_t(first_block + uint64_t(block)));
    alignas(64) uint32_t word[16][W];
    for (int i = 0; i < 16; ++i) dpk_store(word[i], made.word[i]);
    for (int half = 0; half < W; half += D) {
      const auto part = [&](int i) __attribute__((always_inline)) {  // 32-bit word i of each pair's four
        return each_of_four([&](int pair) __attribute__((always_inline)) {
          return __builtin_convertvector(dpk_load<vud>(word[4 * pair + i] + half), vul);
        });
      };
      const Numbers radius = square_root(log_uniform(part(1), part(0), part(2) & 0xfffu) * -2.0);
      Numbers sine, cosine;
      sine_cosine(part(3), part(2), sine, cosine);
      const Numbers even = radius * cosine, odd = radius * sine;
      store_blocks(out + 8 * (block + half), even, odd);
    }
  }
}
