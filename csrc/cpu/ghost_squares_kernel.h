// The products of two Gram matrices, summed: sum over s, t of (l_s . l_t)(r_s . r_t) is the squared norm of
// sum over t of l_t r_t^T, which nobody makes. Grams are symmetric: only t >= s is computed, in squares of kBlock. Of p
// products each passes no more roundings than min(p, 128) + ceil(p / 128), which grams.py reckons with.

// out[s - first][t - other] = x_s . x_t for rows s from `first` and t from `other` on, up to kBlock of each, t >= s.
DPK_INLINE void gram_square(const Terms& x, int64_t steps, int64_t width, int64_t first, int64_t other,
                            Scratch& scratch, ProductRows out) {
  const FactorRows own = scratch.factors[0], others = first == other ? own : scratch.factors[1];
  const int64_t rows = at_most(steps - first, kBlock), columns = at_most(steps - other, kBlock);
  if (width == 0) __builtin_memset(out, 0, sizeof(scratch.products[0]));
  for (int64_t k = 0; k < width; k += kDepth) {
    const int64_t depth = at_most(width - k, kDepth);
    const bool diagonal = first == other;
    // Elements take the place of terms, and terms of elements.
    const auto turned = [&](int64_t t) __attribute__((always_inline)) {
      return Terms{x.from(t, k).at, x.item, x.term};
    };
    gather(turned(first), depth, rows, own);
    if (!diagonal) gather(turned(other), depth, columns, others);
    product_block(own, others, depth, rows, columns, diagonal, into(out, k > 0));
  }
}

// In float64; its products are exact.
DPK_INLINE double inner_product(const float* x, const float* y, int64_t count) {
  vd sums = {};
  int64_t c = 0;
  for (; c + D <= count; c += D) {
    sums += __builtin_convertvector(dpk_load<vfd>(x + c), vd) * __builtin_convertvector(dpk_load<vfd>(y + c), vd);
  }
  double sum = 0.0;
  for (int i = 0; i < D; ++i) sum += sums[i];
  for (; c < count; ++c) sum += double(x[c]) * double(y[c]);
  return sum;
}

GhostSums ghost_squares(const Terms& left, int64_t width, const Terms& right, int64_t depth, int64_t steps,
                        int64_t first, Scratch& scratch) {
  const ProductRows lefts = scratch.products[0], rights = scratch.products[1];
  const int64_t rows = at_most(steps - first, kBlock);
  GhostSums sums = {};
  for (int64_t other = first; other < steps; other += kBlock) {
    const int64_t columns = at_most(steps - other, kBlock);
    gram_square(left, steps, width, first, other, scratch, lefts);
    gram_square(right, steps, depth, first, other, scratch, rights);
    for (int64_t s = 0; s < rows; ++s) {
      const float *l = lefts[s], *r = rights[s];
      const bool diagonal = first == other;
      const int64_t after = diagonal ? s + 1 : 0;
      sums.square += 2.0 * inner_product(l + after, r + after, columns - after);
      if (!diagonal) continue;
      const double own = __builtin_sqrt(double(l[s])), others = __builtin_sqrt(double(r[s]));
      sums.square += double(l[s]) * double(r[s]);
      sums.products += own * others, sums.lefts += own, sums.rights += others;
    }
  }
  return sums;
}
