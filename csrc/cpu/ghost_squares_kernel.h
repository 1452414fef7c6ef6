// The products of two Gram matrices, summed: sum over s, t of (l_s . l_t)(r_s . r_t) is the squared norm of
// sum over t of l_t r_t^T, which nobody makes. Grams are symmetric: only t >= s is computed, in squares of 48 by 48.
//
// Rows are copied 384 elements at a time to where they stand close together (at a stride of 4 KiB they would drive each
// other out of the cache), zeros beyond their ends. Inner products are made tile by tile, 4 rows s by 3 rows t: 12
// registers of running sums. A lane adds 384 / W products at most, then the lanes are added, then the parts of 384: of
// p products each passes no more roundings than min(p, 128) + ceil(p / 128) + 1, which grams.py reckons with.

constexpr int kGhostRows = 48;
constexpr int kGhostDepth = 384;
constexpr int kGhostNear = 12;  // rows t that stay in the first-level cache while all rows s pass
constexpr int kTileS = 4, kTileT = 3;

struct GramBlock {
  float row[kGhostRows][kGhostDepth + 16];
};
struct GramSquare {
  float row[kGhostRows][kGhostRows];
};

DPK_INLINE vf multiply_add(vf a, vf b, vf sum) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, sum);
#else
  return sum + a * b;
#endif
}

// out[i] = the sum of the lanes of value[i].
DPK_INLINE void lane_sums(const vf (&value)[4], float (&out)[4]) {
#if defined(__AVX2__)
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(value[0], value[1]), _mm256_hadd_ps(value[2], value[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = (value[i][0] + value[i][1]) + (value[i][2] + value[i][3]);
#endif
}

// out[s][t] += x[s] . y[t] for 4 rows of x from `s` on and 3 rows of y from `t` on; depth a multiple of W.
DPK_INLINE void gram_tile(const GramBlock& x, const GramBlock& y, int64_t depth, int64_t s, int64_t t, GramSquare& out) {
  vf sums[kTileT][kTileS] = {};
  for (int64_t k = 0; k < depth; k += W) {
    vf other[kTileT];
    for (int j = 0; j < kTileT; ++j) other[j] = dpk_load<vf>(y.row[t + j] + k);
    for (int i = 0; i < kTileS; ++i) {
      const vf own = dpk_load<vf>(x.row[s + i] + k);
      for (int j = 0; j < kTileT; ++j) sums[j][i] = multiply_add(own, other[j], sums[j][i]);
    }
  }
  for (int j = 0; j < kTileT; ++j) {
    float part[kTileS];
    lane_sums(sums[j], part);
    for (int i = 0; i < kTileS; ++i) out.row[s + i][t + j] += part[i];
  }
}

DPK_INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
DPK_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// `rows` rows of `count` elements, 48 and 384 at most, with zeros up to whole tiles and registers.
DPK_INLINE void gather_rows(const float* x, int64_t stride, int64_t rows, int64_t count, GramBlock& out) {
  const int64_t all_rows = round_up(rows, kTileS * kTileT), all = round_up(count, W);
  for (int64_t s = 0; s < all_rows; ++s) {
    const int64_t real = s < rows ? count : 0;
    if (real > 0) __builtin_memcpy(out.row[s], x + s * stride, size_t(real) * sizeof(float));
    for (int64_t k = real; k < all; ++k) out.row[s][k] = 0.0f;
  }
}

// out[s - first][t - other] = x_s . x_t for rows s from `first` and t from `other` on, up to 48 of each, where t >= s.
DPK_INLINE void gram_square(const float* x, int64_t stride, int64_t steps, int64_t depth, int64_t first, int64_t other,
                            GramSquare& out) {
  alignas(64) static thread_local GramBlock own_rows, other_rows;
  const int64_t rows = at_most(steps - first, kGhostRows), columns = at_most(steps - other, kGhostRows);
  __builtin_memset(&out, 0, sizeof(out));
  for (int64_t k = 0; k < depth; k += kGhostDepth) {
    const int64_t count = at_most(depth - k, kGhostDepth), whole = round_up(count, W);
    gather_rows(x + first * stride + k, stride, rows, count, own_rows);
    if (first != other) gather_rows(x + other * stride + k, stride, columns, count, other_rows);
    const GramBlock& others = first == other ? own_rows : other_rows;
    for (int64_t near = 0; near < columns; near += kGhostNear) {
      const int64_t end = at_most(near + kGhostNear, columns);
      for (int64_t s = 0; s < rows; s += kTileS) {
        const int64_t diagonal = first == other ? s / kTileT * kTileT : 0;
        for (int64_t t = diagonal > near ? diagonal : near; t < end; t += kTileT) {
          gram_tile(own_rows, others, whole, s, t, out);
        }
      }
    }
  }
}

// The part of the sum that rows s from `first` on have, 48 of them at most, with all t >= s; those with t > s count
// twice. left, right: rows of `steps` terms, of `width` and `depth` elements.
double ghost_squares(const float* left, int64_t left_stride, int64_t width, const float* right, int64_t right_stride,
                     int64_t depth, int64_t steps, int64_t first) {
  alignas(64) static thread_local GramSquare lefts, rights;
  const int64_t rows = at_most(steps - first, kGhostRows);
  double sum = 0.0;
  for (int64_t other = first; other < steps; other += kGhostRows) {
    const int64_t columns = at_most(steps - other, kGhostRows);
    gram_square(left, left_stride, steps, width, first, other, lefts);
    gram_square(right, right_stride, steps, depth, first, other, rights);
    for (int64_t s = 0; s < rows; ++s) {
      const bool diagonal = first == other;
      double later = 0.0;
      for (int64_t t = diagonal ? s + 1 : 0; t < columns; ++t) {
        later += double(lefts.row[s][t]) * double(rights.row[s][t]);
      }
      sum += 2.0 * later;
      if (diagonal) sum += double(lefts.row[s][s]) * double(rights.row[s][s]);
    }
  }
  return sum;
}
