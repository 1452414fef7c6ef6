// The loops of what comes after the backward: norms, the clipped sum, its noise. Compiled once for each vector width, as
// those of isa.h, and for AVX-512 besides: they wait for arithmetic where the others wait for memory.
#pragma once

#include <cstdint>

namespace dpk {

struct ChaChaInput {
  uint32_t key[8];
  uint32_t nonce[3];  // step (low, high), stream
};

// Of the terms l_t, r_t of one sample.
struct GhostSums {
  double square;    // sum over s, t of (l_s . l_t)(r_s . r_t)
  double products;  // sum over t of |l_t| |r_t|
  double lefts;     // of |l_t|
  double rights;    // of |r_t|
};

// Of what is multiplied at once: rows and columns of the result at most, and products of an element at most.
constexpr int64_t kBlock = 256, kDepth = 128;
constexpr int64_t kStride = kBlock + 16;  // elements of a factor from one product to the next

// One factor of outer products: element c of term t is at[t * term + c * item], one of the strides being 1.
struct Terms {
  const float* at;
  int64_t term, item;

  Terms from(int64_t t, int64_t c) const { return {at + t * term + c * item, term, item}; }
};

// Where one thread multiplies; its content means nothing between two calls.
struct alignas(64) Scratch {
  float factors[2][kDepth][kStride];
  float products[2][kBlock + 16][kBlock];  // whole tiles
};

Scratch& scratch();  // of this thread (clipped_outer_sum.cpp)

struct ReleaseKernels {
  // sum of in[c]^2, c < count, in float64
  double (*sum_of_squares)(const float* in, int64_t count);

  // What the pairs s, t < steps whose smaller one lies in first ... first + kBlock - 1 add to `square`, and these terms
  // to the others. left: terms of `width` elements, right: of `depth`.
  GhostSums (*ghost_squares)(const Terms& left, int64_t width, const Terms& right, int64_t depth, int64_t steps,
                             int64_t first, Scratch& scratch);

  // total[r * total_stride + c] += floor(factor * o + 0.5), o = sum over t < steps of left_t[r] right_t[c], r < rows, c <
  // columns, both at most kBlock
  void (*add_outer_sum)(int64_t* total, int64_t total_stride, const Terms& left, int64_t rows, const Terms& right,
                        int64_t columns, int64_t steps, double factor, Scratch& scratch);

  // total[c] += floor(double(in[c]) * factor + 0.5), c < count
  void (*add_rounded)(int64_t* total, const float* in, int64_t count, double factor);

  // out[8 * i + w] = 64-bit word w of block first_block + i, i < blocks
  void (*words)(uint64_t* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks);
  // out[8 * i + e] = standard normal e of block first_block + i, i < blocks, rounded up to 16
  void (*normals)(double* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks);

  // out[c] = (total[c] + floor(noise_std * z[c] + 0.5)) * scale, c < count; |noise_std * z[c]| < 2^51
  void (*add_noise)(float* out, const int64_t* total, const double* z, int64_t count, double noise_std, double scale);
};

}  // namespace dpk
