// One visit to a gradient [B, R, C]: an op writes a block of it, and the block is summed before it leaves the cache.
// Blocks are cut by the shape of one sample, so that a sample's bits do not depend on the batch or on threads.
#pragma once

#include <algorithm>
#include <vector>

#include "checks_backward.h"
#include "cpu/isa.h"
#include "plan.h"

namespace dpk {

constexpr int64_t kBlockBytes = 1 << 14;  // of one tensor
constexpr int64_t kSlabBytes = 1 << 20;   // rows of a large sample are cut into slabs, so that more threads have work

inline int type_number(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return static_cast<int>(type == ScalarType::Float      ? Type::float32
                          : type == ScalarType::BFloat16 ? Type::bfloat16
                                                         : Type::float16);
}

inline int64_t item_bytes(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

// Address of element i of a tensor with items of `bytes`.
inline const char* element(const Tensor& x, int64_t bytes, int64_t i) {
  return static_cast<const char*>(x.const_data_ptr()) + i * bytes;
}
inline char* mutable_element(const Tensor& x, int64_t bytes, int64_t i) {
  return static_cast<char*>(x.mutable_data_ptr()) + i * bytes;
}

// write(first, count) for blocks of `count` elements; each begins on a whole byte of bits.
template <class Write>
void visit_elements(int64_t count, int64_t bytes, const Write& write) {
  const int64_t block = kBlockBytes / bytes;
  torch::stable::parallel_for(0, (count + block - 1) / block, plan_grain(kBlockBytes), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * block;
    write(first, std::min(count, end * block) - first);
  });
}

constexpr int64_t kSlot = 16;  // columns; see add_rows

// sums [slots of C], as columns.
inline float column_of(const std::vector<float>& sums, int64_t width, int64_t c) {
  const int64_t whole = width / kSlot * kSlot;
  return sums[c < whole || width < kSlot ? c : whole + c - (width - kSlot)];
}

// write(first row, rows) for blocks of whole rows, counted over the batch; rows [B, C] are the sums over R of
// `summed`, which is what was written or read. At most 19 float32 additions in one chain within a block and 32 over
// blocks, then float64.
template <class Write>
void visit_rows(const Tensor& grad, const Tensor& summed, const Tensor& rows, int64_t reduce, const Write& write) {
  const int64_t batch = grad.size(0), length = grad.size(1), width = grad.size(2), bytes = item_bytes(grad);
  if (batch == 0 || (width == 0 && reduce == 1)) return;
  const int64_t row_bytes = std::max<int64_t>(1, width * bytes);
  int64_t block = std::min<int64_t>(128, std::max<int64_t>(1, kBlockBytes / row_bytes));
  if (block > 4) block -= block % (block > 8 ? 8 : 4);
  if (reduce == 0) {
    const int64_t count = batch * length, blocks = (count + block - 1) / block;
    torch::stable::parallel_for(0, blocks, plan_grain(block * row_bytes), [&](int64_t begin, int64_t end) {
      write(begin * block, std::min(count, end * block) - begin * block);
    });
    return;
  }
  const int64_t together = width < 4 * kSlot ? 1 : 32;  // blocks in one float32 sum
  int64_t slab = length;
  if (length * row_bytes > 2 * kSlabBytes) slab = (kSlabBytes / row_bytes + block) / block * block;
  const int64_t slabs = length == 0 ? 1 : (length + slab - 1) / slab;
  const auto add = kernels().backward->add_rows[type_number(grad)];
  float* out = rows.mutable_data_ptr<float>();
  std::vector<double> partial(slabs > 1 ? batch * slabs * width : 0);
  torch::stable::parallel_for(0, batch * slabs, plan_grain(slab * row_bytes), [&](int64_t begin, int64_t end) {
    std::vector<float> sums((width + kSlot - 1) / kSlot * kSlot);
    std::vector<double> total(width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / slabs, start = item % slabs * slab, stop = std::min(length, start + slab);
      std::fill(sums.begin(), sums.end(), 0.0f);
      const bool folded = stop - start > block * together || slabs > 1;
      if (folded) std::fill(total.begin(), total.end(), 0.0);
      int64_t pending = 0;
      for (int64_t row = start; row < stop; row += block) {
        const int64_t count = std::min(block, stop - row), first = sample * length + row;
        write(first, count);
        add(element(summed, bytes, first * width), count, width, sums.data(), pending == 0);
        if (folded && (++pending == together || row + block >= stop)) {
          for (int64_t c = 0; c < width; ++c) total[c] += double(column_of(sums, width, c));
          pending = 0;
        } else if (!folded) {
          pending = 1;
        }
      }
      if (slabs > 1) {
        std::copy(total.begin(), total.end(), partial.begin() + item * width);
      } else {
        for (int64_t c = 0; c < width; ++c) {
          out[sample * width + c] = folded ? float(total[c]) : column_of(sums, width, c);
        }
      }
    }
  });
  if (slabs == 1) return;
  for (int64_t sample = 0; sample < batch; ++sample) {
    for (int64_t c = 0; c < width; ++c) {
      double sum = 0.0;
      for (int64_t s = 0; s < slabs; ++s) sum += partial[(sample * slabs + s) * width + c];
      out[sample * width + c] = float(sum);
    }
  }
}

// write(row, from, count) for parts of rows, or (row, 0, rows * C) for several rows of one sample; sums over C.
template <class Write>
void visit_channels(const Tensor& grad, const Tensor& summed, const Tensor& rows, const Write& write) {
  constexpr int64_t kLongRow = 4 * kBlockBytes, kPart = 8192;  // bytes, elements
  const int64_t batch = grad.size(0), length = grad.size(1), width = grad.size(2), bytes = item_bytes(grad);
  if (batch == 0 || length == 0) return;
  const int64_t row_bytes = std::max<int64_t>(1, width * bytes);
  int64_t block = std::min(length, std::max<int64_t>(1, kBlockBytes / row_bytes));
  if (block > 8) block -= block % 8;
  const int64_t blocks = (length + block - 1) / block;
  const auto sum = kernels().channels_first[type_number(grad)];
  float* out = rows.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, batch * blocks, plan_grain(block * row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item % blocks * block, count = std::min(block, length - start);
      const int64_t row = item / blocks * length + start;
      if (row_bytes <= kLongRow) {
        write(row, 0, count * width);
        sum(element(summed, bytes, row * width), width, width, count, out + row, false);
        continue;
      }
      double total = 0.0;  // of the one row of this block
      for (int64_t from = 0; from < width; from += kPart) {
        const int64_t part = std::min(kPart, width - from);
        float value;
        write(row, from, part);
        sum(element(summed, bytes, row * width + from), part, part, 1, &value, false);
        total += double(value);
      }
      out[row] = float(total);
    }
  });
}

// write(first, count) over all elements, with the sums that `reduce` asks for of what was written.
template <class Write>
void visit_and_sum(const Tensor& grad, const Tensor& dx, const Tensor& rows, int64_t reduce, const Write& write) {
  const int64_t width = grad.size(2);
  if (reduce == 0) {
    visit_elements(grad.numel(), item_bytes(grad), write);
  } else if (reduce == 1) {
    visit_rows(grad, dx, rows, reduce, [&](int64_t row, int64_t count) { write(row * width, count * width); });
  } else {
    visit_channels(grad, dx, rows,
                   [&](int64_t row, int64_t from, int64_t count) { write(row * width + from, count); });
  }
}

}  // namespace dpk
