// Matrix products of small blocks: out[r][c] (= or +=) sum over k of a[k][r] b[k][c].
//
// Both factors stand as rows of kBlock elements for each k, where a stride of 1088 bytes spreads them over the cache (at
// 4 KiB they would drive each other out of it). Of each tile of the result, kTileRows by 2 registers, the running sums
// stay in registers: for every k two loads of b and a broadcast of each row's a, enough sums to hide the latency of a
// multiplication. An element's products are added one after the other, kDepth at most, then to what `out` held.

constexpr int kTileRows = W == 16 ? 12 : 6;
constexpr int kTileColumns = 2 * W;
static_assert(kTileRows <= 16 && kBlock % kTileColumns == 0, "whole tiles fit into kBlock + 16 rows, kBlock columns");

typedef float (*FactorRows)[kStride];
typedef float (*ProductRows)[kBlock];

DPK_INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

DPK_INLINE vf multiply_add(vf a, vf b, vf sum) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, sum);
#else
  return sum + a * b;
#endif
}

// The tile whose corner is row r, column c, `registers` of columns: use(row, column, W elements) for all of it.
template <int registers, class Use>
DPK_INLINE void product_tile(const FactorRows a, const FactorRows b, int64_t depth, int64_t r, int64_t c, Use use) {
  vf sums[kTileRows][registers] = {};
  const float *own = a[0] + r, *other = b[0] + c;
  for (const float* end = own + depth * kStride; own != end; own += kStride, other += kStride) {
    vf right[registers];
    for (int j = 0; j < registers; ++j) right[j] = dpk_load<vf>(other + j * W);
    for (int i = 0; i < kTileRows; ++i) {
      const vf left = own[i] - vf{};
      for (int j = 0; j < registers; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < registers; ++j) use(r + i, c + j * W, sums[i][j]);
  }
}

// All of it, or (upper) what lies on and above the diagonal and some of the rest. Rows and columns beyond the last are
// made of what stands there, up to whole tiles.
template <class Use>
DPK_INLINE void product_block(const FactorRows a, const FactorRows b, int64_t depth, int64_t rows, int64_t columns,
                              bool upper, Use use) {
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    const int64_t end = upper ? at_most(rows, c + kTileColumns) : rows;
    for (int64_t r = 0; r < end; r += kTileRows) {
      const bool second = c + W < columns, first = !upper || r < c + W;
      if (first && second) {
        product_tile<2>(a, b, depth, r, c, use);
      } else {
        product_tile<1>(a, b, depth, r, first ? c : c + W, use);
      }
    }
  }
}

// Elements of which a factor's tiles of `count` rows or columns are made.
DPK_INLINE int64_t in_tiles(int64_t count) { return at_most(count + kTileColumns, kStride); }

// out[k][c] = x[k * stride + c] for k < depth, c < count, zeros beside them.
DPK_INLINE void gather_rows(const float* x, int64_t stride, int64_t depth, int64_t count, FactorRows out) {
  for (int64_t k = 0; k < depth; ++k) {
    if (count == kBlock) {
      __builtin_memcpy(out[k], x + k * stride, kBlock * sizeof(float));
    } else {
      __builtin_memcpy(out[k], x + k * stride, size_t(count) * sizeof(float));
    }
    for (int64_t c = count; c < in_tiles(count); ++c) out[k][c] = 0.0f;
  }
}

#if defined(__AVX2__)
// Eight rows of eight, turned.
DPK_INLINE void turn8(const float* x, int64_t stride, float* out, int64_t out_stride) {
  __m256 row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(x + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
  }
}
#endif

// out[k][c] = x[c * stride + k] for c < count, k < depth, zeros beside them.
DPK_INLINE void gather_turned(const float* x, int64_t stride, int64_t count, int64_t depth, FactorRows out) {
  int64_t turned = 0, deep = 0;
#if defined(__AVX2__)
  turned = count / 8 * 8, deep = depth / 8 * 8;
  for (int64_t c = 0; c < turned; c += 8) {
    for (int64_t k = 0; k < deep; k += 8) turn8(x + c * stride + k, stride, &out[k][c], kStride);
  }
#endif
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = k < deep ? turned : 0; c < count; ++c) out[k][c] = x[c * stride + k];
    for (int64_t c = count; c < in_tiles(count); ++c) out[k][c] = 0.0f;
  }
}

// `depth` terms, `count` elements of each: out[k][c] is element c of term k.
DPK_INLINE void gather(const Terms& x, int64_t depth, int64_t count, FactorRows out) {
  if (x.item == 1) {
    gather_rows(x.at, x.term, depth, count, out);
  } else {
    gather_turned(x.at, x.item, count, depth, out);
  }
}

// Add to `out` what is made, or put it there.
DPK_INLINE auto into(ProductRows out, bool add) {
  return [out, add](int64_t row, int64_t column, vf made) __attribute__((always_inline)) {
    float* to = out[row] + column;
    dpk_store(to, add ? vf(dpk_load<vf>(to) + made) : made);
  };
}

DPK_INLINE void add_rounded(int64_t* total, vf in, double factor) {
  float each[W];
  dpk_store(each, in);
  add_rounded(total, dpk_load<vfd>(each), splat(factor));
  add_rounded(total + D, dpk_load<vfd>(each + D), splat(factor));
}

void add_outer_sum(int64_t* total, int64_t total_stride, const Terms& left, int64_t rows, const Terms& right,
                   int64_t columns, int64_t steps, double factor, Scratch& scratch) {
  const FactorRows a = scratch.factors[0], b = scratch.factors[1];
  const ProductRows out = scratch.products[0];
  for (int64_t t = 0; t < steps; t += kDepth) {
    const int64_t depth = at_most(steps - t, kDepth);
    const bool add = t > 0, last = t + depth == steps;
    gather(left.from(t, 0), depth, rows, a);
    gather(right.from(t, 0), depth, columns, b);
    const auto keep = into(out, add);
    if (!kAnyRange || !last) {
      product_block(a, b, depth, rows, columns, false, keep);
      continue;
    }
    product_block(a, b, depth, rows, columns, false,
                  [&](int64_t row, int64_t column, vf made) __attribute__((always_inline)) {
                    if (row >= rows) return;
                    if (add) made += dpk_load<vf>(out[row] + column);
                    int64_t* to = total + row * total_stride + column;
                    if (column + W <= columns) {
                      add_rounded(to, made, factor);
                    } else {
                      float each[W];
                      dpk_store(each, made);
                      add_rounded(to, each, columns - column, factor);
                    }
                  });
  }
  if (kAnyRange) return;
  for (int64_t r = 0; r < (steps > 0 ? rows : 0); ++r) add_rounded(total + r * total_stride, out[r], columns, factor);
}
