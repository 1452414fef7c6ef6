// The sum of a block of rows that has just been written or read, while it lies in the cache.

// Tree sum of the rows in, in + stride, ... at one place.
template <class T, int rows>
DPK_INLINE Lanes tree_of_rows(const typename T::Item* in, int64_t stride) {
  if constexpr (rows == 1) {
    return T::load(in);
  } else {
    return tree_of_rows<T, rows / 2>(in, stride) + tree_of_rows<T, rows / 2>(in + (rows / 2) * stride, stride);
  }
}

// A block has at most 128 rows: at most 19 float32 additions in one chain, and one to the
// blocks before. Less than a vector is summed in float64.
template <class T>
void add_rows(const void* from, int64_t rows, int64_t width, float* sums, bool first) {
  const auto* in = static_cast<const typename T::Item*>(from);
  const auto add = [&](float* slot, int64_t column) __attribute__((always_inline)) {
    const auto* at = in + column;
    Lanes sum = zero_lanes();
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) sum = sum + tree_of_rows<T, 8>(at + row * width, width);
    if (rows & 4) sum = sum + tree_of_rows<T, 4>(at + row * width, width), row += 4;
    if (rows & 2) sum = sum + tree_of_rows<T, 2>(at + row * width, width), row += 2;
    if (rows & 1) sum = sum + T::load(at + row * width);
    Float32::store(slot, first ? sum : Float32::load(slot) + sum);
  };
  if (width >= kLanes) {
    int64_t column = 0;
    for (; column + kLanes <= width; column += kLanes) add(sums + column, column);
    if (column < width) add(sums + column, width - kLanes);
    return;
  }
  double total[kLanes] = {};
  for (int64_t start = 0; start < rows; start += kLanes) {
    const int64_t count = rows - start < kLanes ? rows - start : kLanes;
    alignas(64) float block[kLanes * kLanes];
    widen_all<T>(in + start * width, count * width, block);
    for (int64_t i = 0; i < count * width; i += width) {
      for (int64_t c = 0; c < width; ++c) total[c] += double(block[i + c]);
    }
  }
  for (int64_t c = 0; c < width; ++c) sums[c] = first ? float(total[c]) : sums[c] + float(total[c]);
}
