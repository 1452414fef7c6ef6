// Sums over time. Every chain of float32 additions is short: groups of rows are added as a tree, group sums into a
// chunk in float32, chunks into float64. The order is fixed by the shape, so neither threads nor width change a bit.

constexpr int64_t kChunkRows = 128;            // features last: at most 16 groups of 8 rows in float32
constexpr int64_t kChunkItems = 32 * 4 * kLanes;  // channels first: at most 32 additions in each of 64 lanes

// Tree sum of the rows in, in + stride, ... at one place.
template <class T, int rows>
DPK_INLINE Lanes sum_rows(const typename T::Item* in, int64_t stride) {
  if constexpr (rows == 1) {
    return load_lanes<T>(in);
  } else {
    return sum_rows<T, rows / 2>(in, stride) + sum_rows<T, rows / 2>(in + (rows / 2) * stride, stride);
  }
}

// chunk[c] (+)= sum of `rows` rows, c < width. The last 16 columns may overlap the ones before: their chunk lies apart.
template <class T, int rows>
DPK_INLINE void add_group(const typename T::Item* in, int64_t stride, int64_t width, float* chunk, bool first) {
  const auto add = [&](int64_t slot, int64_t column) __attribute__((always_inline)) {
    Lanes sum = sum_rows<T, rows>(in + column, stride);
    if (!first) sum = sum + load_lanes<Float32>(chunk + slot);
    store_lanes(chunk + slot, sum);
  };
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) add(column, column);
  if (column < width) add(column, width - kLanes);
}

DPK_INLINE void write(float* out, const float* sums, int64_t width, bool accumulate) {
  if (accumulate) {
    for (int64_t c = 0; c < width; ++c) out[c] += sums[c];
  } else {
    __builtin_memcpy(out, sums, size_t(width) * sizeof(float));
  }
}

// Any strides, one column after the other; the same groups and chunks as features_last.
template <class T>
void strided(const void* from, int64_t steps, int64_t stride_steps, int64_t stride_features, int64_t width, float* out,
             bool accumulate) {
  const auto* in = static_cast<const typename T::Item*>(from);
  for (int64_t c = 0; c < width; ++c) {
    const auto at = [&](int64_t t) { return T::scalar(in[t * stride_steps + c * stride_features]); };
    double total = 0.0;
    for (int64_t start = 0; start < steps; start += kChunkRows) {
      const int64_t end = steps - start < kChunkRows ? steps : start + kChunkRows;
      float chunk = 0.0f;
      int64_t t = start;
      for (; t + 8 <= end; t += 8) {
        chunk += ((at(t) + at(t + 1)) + (at(t + 2) + at(t + 3))) + ((at(t + 4) + at(t + 5)) + (at(t + 6) + at(t + 7)));
      }
      for (; t < end; ++t) chunk += at(t);
      total += chunk;
    }
    out[c] = accumulate ? out[c] + float(total) : float(total);
  }
}

template <class T>
void features_last(const void* from, int64_t steps, int64_t stride, int64_t width, float* out, bool accumulate) {
  if (width < kLanes) return strided<T>(from, steps, stride, 1, width, out, accumulate);
  const auto* in = static_cast<const typename T::Item*>(from);
  alignas(64) float chunk[kMaxTile + kLanes];
  alignas(64) double total[kMaxTile + kLanes];
  const int64_t slots = (width + kLanes - 1) / kLanes * kLanes;
  if (steps == 0) __builtin_memset(chunk, 0, size_t(slots) * sizeof(float));
  for (int64_t start = 0; start < steps; start += kChunkRows) {
    const int64_t rows = steps - start < kChunkRows ? steps - start : kChunkRows;
    const auto* at = in + start * stride;
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) add_group<T, 8>(at + row * stride, stride, width, chunk, row == 0);
    if (rows & 4) add_group<T, 4>(at + row * stride, stride, width, chunk, row == 0), row += 4;
    if (rows & 2) add_group<T, 2>(at + row * stride, stride, width, chunk, row == 0), row += 2;
    if (rows & 1) add_group<T, 1>(at + row * stride, stride, width, chunk, row == 0);
    if (steps <= kChunkRows) break;
    for (int64_t c = 0; c < slots; ++c) total[c] = (start == 0 ? 0.0 : total[c]) + double(chunk[c]);
  }
  if (steps > kChunkRows) {
    for (int64_t c = 0; c < slots; ++c) chunk[c] = float(total[c]);
  }
  // The slots of an overlapping last vector hold the columns width - 16 ... width - 1.
  const int64_t whole = width / kLanes * kLanes;
  if (whole < width) {
    float last[kLanes];
    __builtin_memcpy(last, chunk + whole, sizeof(last));
    __builtin_memcpy(chunk + width - kLanes, last, sizeof(last));
  }
  write(out, chunk, width, accumulate);
}

// One row of `count` <= kChunkItems neighbours, count >= 16, into 16 lanes.
template <class T>
DPK_INLINE Lanes sum_chunk(const typename T::Item* in, int64_t count) {
  Lanes a = zero_lanes(), b = a, c = a, d = a;
  int64_t t = 0;
  for (; t + 4 * kLanes <= count; t += 4 * kLanes) {
    a = a + load_lanes<T>(in + t);
    b = b + load_lanes<T>(in + t + kLanes);
    c = c + load_lanes<T>(in + t + 2 * kLanes);
    d = d + load_lanes<T>(in + t + 3 * kLanes);
  }
  if (t + kLanes <= count) a = a + load_lanes<T>(in + t), t += kLanes;
  if (t + kLanes <= count) b = b + load_lanes<T>(in + t), t += kLanes;
  if (t + kLanes <= count) c = c + load_lanes<T>(in + t), t += kLanes;
  if (t < count) {
    // The last 16 items again, those already counted masked to zero.
    static const int32_t mask[2 * kLanes] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                             -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    Lanes last = load_lanes<T>(in + count - kLanes);
    for (int i = 0; i < N; ++i) last.v[i] = as<vf>(vi(as<vi>(last.v[i]) & load<vi>(mask + (count - t) + i * W)));
    d = d + last;
  }
  return (a + b) + (c + d);
}

template <class T>
void channels_first(const void* from, int64_t steps, int64_t stride, int64_t width, float* out, bool accumulate) {
  if (steps < kLanes) return strided<T>(from, steps, 1, stride, width, out, accumulate);
  const auto* in = static_cast<const typename T::Item*>(from);
  for (int64_t c = 0; c < width; ++c) {
    const auto* row = in + c * stride;
    alignas(64) double total[kLanes] = {};
    int64_t start = 0;
    while (start < steps) {
      // A remainder too short for a vector is joined to the chunk before it.
      const int64_t left = steps - start;
      const int64_t count = left < kChunkItems + kLanes ? left : kChunkItems;
      alignas(64) float lanes[kLanes];
      store_lanes(lanes, sum_chunk<T>(row + start, count));
      for (int i = 0; i < kLanes; ++i) total[i] += double(lanes[i]);
      start += count;
    }
    const float sum = float(tree_sum(total));
    out[c] = accumulate ? out[c] + sum : sum;
  }
}
