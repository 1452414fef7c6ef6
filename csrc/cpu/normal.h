// Box-Muller in float64 on two 64-bit words: z = sqrt(-2 ln u) * cos or sin(2 pi angle); u has 76 bits, the first word
// and the 12 low bits of the second, the angle has the other 52. Multiply and add stay apart (no contraction), and
// logarithm, sine and cosine are defined here by their polynomials (fdlibm's e_log.c, k_sin.c, k_cos.c), so that every
// backend gives the same bits. Only square root and division are borrowed: IEEE defines theirs. Worked example: words
// (2^64 - 1, 2^12 - 1) give ln 1 = 0 and so z = 0; words (0, 0) give z = sqrt(152 ln 2) = 10.26, the largest there is.

// An integer below 2^32 in each 64-bit lane, as float64, exactly.
DPK_INLINE vd small_to_double(vul value) { return as<vd>(vul(value | 0x4330000000000000u)) - 0x1p52; }

// high * 2^32 + low, correctly rounded: both terms are exact, the addition rounds once.
DPK_INLINE vd to_double(vul high, vul low) { return small_to_double(high) * 0x1p32 + small_to_double(low); }

DPK_INLINE vd select(vl mask, vd yes, vd no) { return as<vd>(vl((mask & as<vl>(yes)) | (~mask & as<vl>(no)))); }

// ln u for u = (2^12 word + low + 1) / 2^76, word = high * 2^32 + rest. From 3/4 on it is taken of 1 - (1 - u): the
// distance from 1 keeps its relative precision, and with it the small radii theirs.
DPK_INLINE vd log_uniform(vul high, vul rest, vul low) {
  const vul near = vul{} - ((high >> 31) & (high >> 30) & 1u);
  const vul flip = near & 0xffffffffu;
  const vul tail = (near & (0xfffu - low)) | (~near & (low + 1u));
  const vd v = (to_double(high ^ flip, rest ^ flip) + small_to_double(tail) * 0x1p-12) * 0x1p-64;
  const vul bits = as<vul>(v);
  vd mantissa = as<vd>(vul((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u));  // [1, 2)
  vd exponent = small_to_double(bits >> 52) - 1023.0;
  const vl upper = mantissa >= splat(1.4142135623730951);
  mantissa = select(upper, mantissa * 0.5, mantissa);
  exponent = select(upper, exponent + 1.0, exponent);

  exponent = select(as<vl>(near), splat(0.0), exponent);
  const vd g = select(as<vl>(near), -v, mantissa - 1.0);
  const vd q = g / (g + 2.0);
  const vd w = q * q;
  const vd series =
      w * (w * (w * (w * (w * (w * (w * 1.479819860511658591e-01 + 1.531383769920937332e-01) +
                               1.818357216161805012e-01) +
                          2.222219843214978396e-01) +
                     2.857142874366239149e-01) +
                3.999999999940941908e-01) +
           6.666666666666735130e-01);
  const vd h = (g * 0.5) * g;
  return exponent * 6.93147180369123816490e-01 -
         ((h - (q * (h + series) + exponent * 1.90821492927058770002e-10)) - g);
}

// Sine and cosine of 2 pi a / 2^52, a the upper 52 bits of the word high * 2^32 + low: the top three bits are the
// octant, the rest is the place in it, counted from its even edge.
DPK_INLINE void sine_cosine(vul high, vul low, vd& sine, vd& cosine) {
  const vul octant = high >> 29;
  const vul place = ((high & 0x1fffffffu) << 32) | (low & 0xfffff000u);
  const vul odd = vul{} - (octant & 1u);
  const vul folded = (odd & ((1ull << 61) - place)) | (~odd & place);
  const vd x = (to_double(folded >> 32, folded & 0xffffffffu) * 0x1p-61) * 0.78539816339744830962;
  const vd z = x * x;

  const vd s = x + (x * z) * (-1.66666666666666324348e-01 +
                              z * (8.33333333332248946124e-03 +
                                   z * (-1.98412698298579493134e-04 +
                                        z * (2.75573137070700676789e-06 +
                                             z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const vd c = (1.0 - z * 0.5) +
               (z * z) * (4.16666666666666019037e-02 +
                          z * (-1.38888888888741095749e-03 +
                               z * (2.48015872894767294178e-05 +
                                    z * (-2.75573143513906633035e-07 +
                                         z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  // Octants 1, 2, 5, 6 swap; 2 to 5 have a negative cosine, 4 to 7 a negative sine.
  const vl swap = as<vl>(vul(vul{} - (((octant + 1u) >> 1) & 1u)));
  const vul sign = vul{} + 0x8000000000000000u;
  const vul negative_cosine = (((octant + 2u) >> 2) & 1u) << 63;
  const vul negative_sine = (octant >> 2) << 63;
  sine = as<vd>(vul(as<vul>(select(swap, c, s)) ^ (negative_sine & sign)));
  cosine = as<vd>(vul(as<vul>(select(swap, s, c)) ^ (negative_cosine & sign)));
}

// One block gives eight normals: words 0 and 1 the first two (cosine, sine), words 2 and 3 the next.
void normals(double* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks) {
  for (int64_t block = 0; block < blocks; block += W) {
    const ChaChaBlocks made = chacha20_blocks(input, uint32_t(first_block + uint64_t(block)));
    alignas(64) double z[8][W];
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t word[4][W];
      for (int i = 0; i < 4; ++i) dpk_store(word[i], made.word[4 * pair + i]);
      for (int half = 0; half < W; half += D) {
        vul part[4];
        for (int i = 0; i < 4; ++i) part[i] = __builtin_convertvector(dpk_load<vud>(word[i] + half), vul);
        const vd square = log_uniform(part[1], part[0], part[2] & 0xfffu) * -2.0;
        vd radius;
        for (int i = 0; i < D; ++i) radius[i] = __builtin_sqrt(square[i]);
        vd sine, cosine;
        sine_cosine(part[3], part[2], sine, cosine);
        dpk_store(z[2 * pair] + half, vd(radius * cosine));
        dpk_store(z[2 * pair + 1] + half, vd(radius * sine));
      }
    }
    const int64_t lanes = blocks - block < W ? blocks - block : W;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int e = 0; e < 8; ++e) out[8 * (block + lane) + e] = z[e][lane];
    }
  }
}
