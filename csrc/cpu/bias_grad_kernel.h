// Sums over time. Every chain of float32 additions is short: groups of rows are added as a tree, group sums into a
// chunk in float32, chunks into float64; what has no vectors is summed in float64 at once. The order is fixed by the
// shape, so neither threads nor vector width change a bit.

constexpr int64_t kChunkRows = 128;            // features last: at most 16 groups of 8 rows in float32
constexpr int64_t kChunkItems = 32 * 4 * kLanes;  // channels first: at most 32 additions in each of 64 lanes

// Tree sum of the rows in, in + stride, ... at one place.
template <class T, int rows>
DPK_INLINE Lanes sum_rows(const typename T::Item* in, int64_t stride) {
  if constexpr (rows == 1) {
    return T::load(in);
  } else {
    return sum_rows<T, rows / 2>(in, stride) + sum_rows<T, rows / 2>(in + (rows / 2) * stride, stride);
  }
}

// chunk[c] (+)= sum of `rows` rows, c < width, every 16 columns in the type's own order of lanes. The last 16 columns
// may overlap the ones before: their chunk lies apart.
template <class T, int rows>
DPK_INLINE void add_group(const typename T::Item* in, int64_t stride, int64_t width, float* chunk, bool first) {
  const auto add = [&](int64_t slot, int64_t column) __attribute__((always_inline)) {
    if constexpr (rows == 8) {
      for (int ahead = 8; ahead < 16; ++ahead) __builtin_prefetch(in + column + ahead * stride);
    }
    Lanes sum = sum_rows<T, rows>(in + column, stride);
    if (!first) sum = sum + Float32::load(chunk + slot);
    Float32::store(chunk + slot, sum);
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

// Any strides, one column after the other, in float64.
template <class T>
void strided(const void* from, int64_t steps, int64_t stride_steps, int64_t stride_features, int64_t width, float* out,
             bool accumulate) {
  const auto* in = static_cast<const typename T::Item*>(from);
  for (int64_t c = 0; c < width; ++c) {
    double sums[4] = {};
    for (int64_t t = 0; t < steps; ++t) sums[t % 4] += double(T::scalar(in[t * stride_steps + c * stride_features]));
    const float sum = float((sums[0] + sums[1]) + (sums[2] + sums[3]));
    out[c] = accumulate ? out[c] + sum : sum;
  }
}

template <class T>
void features_last(const void* from, int64_t steps, int64_t stride, int64_t width, float* out, bool accumulate) {
  if (width < kLanes) return strided<T>(from, steps, stride, 1, width, out, accumulate);
  const auto* in = static_cast<const typename T::Item*>(from);
  alignas(64) float chunk[kMaxTile + 2 * kLanes];
  alignas(64) double total[kMaxTile + 2 * kLanes];
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
  float sums[kMaxTile + kLanes];
  for (int64_t c = 0; c + kLanes <= width; c += kLanes) T::store(sums + c, Float32::load(chunk + c));
  if (width % kLanes != 0) T::store(sums + width - kLanes, Float32::load(chunk + slots - kLanes));
  write(out, sums, width, accumulate);
}

// Asks for the `bytes` that lie kAhead after `from`: a conversion to float32 fills the processor's window sooner than a
// plain load would, so that too few loads are under way without it.
constexpr int64_t kAhead = 1536;
template <size_t bytes>
DPK_INLINE void prefetch(const void* from) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(from) + kAhead + line);
}

// One row of `count` <= kChunkItems neighbours, count >= 16, into eight lanes.
template <class T>
DPK_INLINE HalfLanes sum_chunk(const typename T::Item* in, int64_t count) {
  Lanes a = zero_lanes(), b = a, c = a, d = a;
  int64_t t = 0;
  for (; t + 4 * kLanes <= count; t += 4 * kLanes) {
    prefetch<4 * kLanes * sizeof(typename T::Item)>(in + t);
    a = a + T::load(in + t);
    b = b + T::load(in + t + kLanes);
    c = c + T::load(in + t + 2 * kLanes);
    d = d + T::load(in + t + 3 * kLanes);
  }
  if (t + kLanes <= count) a = a + T::load(in + t), t += kLanes;
  if (t + kLanes <= count) b = b + T::load(in + t), t += kLanes;
  if (t + kLanes <= count) c = c + T::load(in + t), t += kLanes;
  // The last 16 items again, without those already counted.
  if (t < count) d = d + T::load_last(in + count - kLanes, count - t);
  return T::fold((a + b) + (c + d));
}

// Sum of `steps` >= 16 neighbours: chunks in float64, lane by lane.
template <class T>
float sum_long_row(const typename T::Item* in, int64_t steps) {
  double total[8] = {};
  for (int64_t start = 0; start < steps;) {
    // A remainder too short for a vector is joined to the chunk before it.
    const int64_t left = steps - start;
    const int64_t count = left < kChunkItems + kLanes ? left : kChunkItems;
    const HalfLanes half = sum_chunk<T>(in + start, count);
    float lane[8];
    for (int part = 0; part < N / 2; ++part) dpk_store(lane + part * W, half.v[part]);
    for (int i = 0; i < 8; ++i) total[i] += double(lane[i]);
    start += count;
  }
  return float(tree_sum8(total));
}

template <class T>
void channels_first(const void* from, int64_t steps, int64_t stride, int64_t width, float* out, bool accumulate) {
  if (steps < kLanes) return strided<T>(from, steps, 1, stride, width, out, accumulate);
  const auto* in = static_cast<const typename T::Item*>(from);
  for (int64_t first = 0; first < width; first += 8) {
    const int64_t channels = width - first < 8 ? width - first : 8;
    const auto* rows = in + first * stride;
    float sums[8];
    if (steps <= kChunkItems) {
      HalfLanes half[8] = {};
      for (int64_t c = 0; c < channels; ++c) half[c] = sum_chunk<T>(rows + c * stride, steps);
      tree_sums8(half, sums);
    } else {
      for (int64_t c = 0; c < channels; ++c) sums[c] = sum_long_row<T>(rows + c * stride, steps);
    }
    write(out + first, sums, channels, accumulate);
  }
}
