// Loops of noisy_sum and random_words: ChaCha20 (RFC 8439) and Box-Muller in float64, one key-stream block a thread.
// Multiply and add stay apart (--fmad=false); logarithm, sine and cosine are fdlibm's polynomials, square root and
// division IEEE's: the same bits as csrc/cpu/normal.h and reference.py.
#pragma once

#include "cuda/device.cuh"

namespace dpk {
namespace cuda {

constexpr int kNoiseThreads = 128;
constexpr int kBlockWords = 8;  // 64-bit words, and so normals, of one key-stream block

struct StreamArguments {
  const int32_t* key;     // [8]
  const int64_t* step;    // [1]
  uint32_t stream;
  int64_t block;          // of the first word
  int64_t skew;           // place of the first word in its block
  int64_t count;          // words, or elements
};

struct NoiseArguments {
  StreamArguments stream;
  const int64_t* total;   // [count]
  float* out;             // [count]
  double noise_std, scale;
};

struct WordsArguments {
  StreamArguments stream;
  int64_t* out;           // [count]
};

__device__ inline uint32_t rotate_left(uint32_t value, int bits) { return (value << bits) | (value >> (32 - bits)); }

__device__ inline void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b, d = rotate_left(d ^ a, 16);
  c += d, b = rotate_left(b ^ c, 12);
  a += b, d = rotate_left(d ^ a, 8);
  c += d, b = rotate_left(b ^ c, 7);
}

// Block `number` of the key stream: 64-bit word w of it in word[w].
__device__ inline void chacha20(const StreamArguments& a, uint32_t number, uint64_t (&word)[kBlockWords]) {
  const auto step = static_cast<uint64_t>(*a.step);
  uint32_t start[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};  // "expand 32-byte k"
#pragma unroll
  for (int i = 0; i < 8; ++i) start[4 + i] = static_cast<uint32_t>(a.key[i]);
  start[12] = number;
  start[13] = static_cast<uint32_t>(step);
  start[14] = static_cast<uint32_t>(step >> 32);
  start[15] = a.stream;
  uint32_t x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = start[i];
  for (int round = 0; round < 20; round += 2) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
#pragma unroll
  for (int w = 0; w < kBlockWords; ++w) {
    word[w] = uint64_t{x[2 * w] + start[2 * w]} | uint64_t{x[2 * w + 1] + start[2 * w + 1]} << 32;
  }
}

// ln u, 2^76 u = 2^12 word + the 12 low bits of the next word + 1. From 3/4 on it is taken of 1 - (1 - u): the distance
// from 1 keeps its relative precision, and with it the small radii theirs.
__device__ inline double log_uniform(uint64_t word, uint64_t next) {
  const bool near = (word >> 62) == 3u;
  if (near) word = ~word;
  const auto low = static_cast<uint32_t>(next) & 0xfffu;
  const double high = static_cast<double>(static_cast<uint32_t>(word >> 32));
  const double rest = static_cast<double>(static_cast<uint32_t>(word));
  const double tail = static_cast<double>(near ? 0xfffu - low : low + 1u);
  const double value = (high * 0x1p32 + rest + tail * 0x1p-12) * 0x1p-64;
  const auto bits = static_cast<uint64_t>(__double_as_longlong(value));
  double mantissa = __longlong_as_double(static_cast<long long>((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u));
  double exponent = static_cast<double>(static_cast<int>(bits >> 52) - 1023);
  if (mantissa >= 1.4142135623730951) {
    mantissa = mantissa * 0.5;
    exponent = exponent + 1.0;
  }
  if (near) exponent = 0.0;
  const double g = near ? -value : mantissa - 1.0;
  const double q = g / (g + 2.0);
  const double w = q * q;
  const double series =
      w * (w * (w * (w * (w * (w * (w * 1.479819860511658591e-01 + 1.531383769920937332e-01) +
                               1.818357216161805012e-01) +
                          2.222219843214978396e-01) +
                     2.857142874366239149e-01) +
                3.999999999940941908e-01) +
           6.666666666666735130e-01);
  const double h = (g * 0.5) * g;
  return exponent * 6.93147180369123816490e-01 -
         ((h - (q * (h + series) + exponent * 1.90821492927058770002e-10)) - g);
}

// Sine and cosine of 2 pi a / 2^52, a the upper 52 bits of the word: the top three are the octant, the rest is the
// place in it, counted from its even edge.
__device__ inline void sine_cosine(uint64_t word, double& sine, double& cosine) {
  const auto octant = static_cast<uint32_t>(word >> 61);
  const uint64_t place = word & 0x1ffffffffffff000u;
  const uint64_t folded = octant & 1u ? (uint64_t{1} << 61) - place : place;
  const double x = (static_cast<double>(static_cast<int64_t>(folded)) * 0x1p-61) * 0.78539816339744830962;
  const double z = x * x;
  const double s = x + (x * z) * (-1.66666666666666324348e-01 +
                                  z * (8.33333333332248946124e-03 +
                                       z * (-1.98412698298579493134e-04 +
                                            z * (2.75573137070700676789e-06 +
                                                 z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double c = (1.0 - z * 0.5) +
                   (z * z) * (4.16666666666666019037e-02 +
                              z * (-1.38888888888741095749e-03 +
                                   z * (2.48015872894767294178e-05 +
                                        z * (-2.75573143513906633035e-07 +
                                             z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  const bool swap = ((octant + 1u) & 2u) != 0;  // octants 1, 2, 5, 6
  sine = swap ? c : s;
  cosine = swap ? s : c;
  if (((octant + 2u) & 4u) != 0) cosine = -cosine;  // octants 2 to 5
  if (octant >= 4u) sine = -sine;
}

// (total + floor(noise_std * z + 1/2)) * scale. A thread makes one key-stream block, its eight normals and eight
// releases: all of them from registers. With kAligned the block's elements start on 16 bytes and are all there, so that
// they are loaded and stored as packets; without, each element is looked at on its own.
// Example: elements 0 to 7 belong to block 0. Words 0 and 1 give z of elements 0 (cosine) and 1 (sine), words 2 and 3
// the next two. A call from element 13 on starts in block 1 with skew 5.
template <bool kAligned>
__global__ void __launch_bounds__(kNoiseThreads) noisy_sum_kernel(const NoiseArguments a) {
  const int64_t number = int64_t{blockIdx.x} * kNoiseThreads + threadIdx.x;
  const int64_t at = number * kBlockWords - a.stream.skew;  // of the block's first element in total and out
  if (at >= a.stream.count) return;
  uint64_t word[kBlockWords];
  chacha20(a.stream, static_cast<uint32_t>(a.stream.block + number), word);
  Packet<int64_t, 2> total[4];
  Packet<float, 4> out[2];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    if constexpr (kAligned) {
      total[pair] = load_packet<int64_t, 2>(a.total + at + 2 * pair);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t j = at + 2 * pair + i;
        total[pair].value[i] = j >= 0 && j < a.stream.count ? a.total[j] : 0;
      }
    }
    const double radius = sqrt(log_uniform(word[2 * pair], word[2 * pair + 1]) * -2.0);
    double sine, cosine;
    sine_cosine(word[2 * pair + 1], sine, cosine);
    const double z[2] = {radius * cosine, radius * sine};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t noisy = total[pair].value[i] + __double2ll_rd(z[i] * a.noise_std + 0.5);
      out[pair / 2].value[2 * pair % 4 + i] = static_cast<float>(static_cast<double>(noisy) * a.scale);
    }
  }
  if constexpr (kAligned) {
    reinterpret_cast<Packet<float, 4>*>(a.out + at)[0] = out[0];
    reinterpret_cast<Packet<float, 4>*>(a.out + at)[1] = out[1];
  } else {
#pragma unroll
    for (int i = 0; i < kBlockWords; ++i) {
      if (at + i >= 0 && at + i < a.stream.count) a.out[at + i] = out[i / 4].value[i % 4];
    }
  }
}

// Without noise: the sum itself, scaled.
__global__ void __launch_bounds__(kNoiseThreads) plain_release_kernel(const NoiseArguments a) {
  const int64_t j = int64_t{blockIdx.x} * kNoiseThreads + threadIdx.x;
  if (j < a.stream.count) a.out[j] = static_cast<float>(static_cast<double>(a.total[j]) * a.scale);
}

// The key stream itself, a block of eight words a thread.
__global__ void __launch_bounds__(kNoiseThreads) random_words_kernel(const WordsArguments a) {
  const int64_t number = int64_t{blockIdx.x} * kNoiseThreads + threadIdx.x;
  const int64_t at = number * kBlockWords - a.stream.skew;
  if (at >= a.stream.count) return;
  uint64_t word[kBlockWords];
  chacha20(a.stream, static_cast<uint32_t>(a.stream.block + number), word);
#pragma unroll
  for (int w = 0; w < kBlockWords; ++w) {
    if (at + w >= 0 && at + w < a.stream.count) a.out[at + w] = static_cast<int64_t>(word[w]);
  }
}

inline StreamArguments stream_arguments(const int32_t* key, const int64_t* step, uint32_t stream, int64_t first,
                                        int64_t count) {
  return {key, step, stream, first / kBlockWords, first % kBlockWords, count};
}

// One thread a key-stream block.
inline int64_t blocks_of(const StreamArguments& a) {
  return divide_up(divide_up(a.skew + a.count, kBlockWords), kNoiseThreads);
}

inline auto noisy_sum_kernel_for(const NoiseArguments& a) -> void (*)(NoiseArguments) {
  if (a.noise_std == 0.0) return plain_release_kernel;
  const bool packets =
      a.stream.skew == 0 && a.stream.count % kBlockWords == 0 && aligned(a.total, 16) && aligned(a.out, 16);
  return packets ? noisy_sum_kernel<true> : noisy_sum_kernel<false>;
}

inline int64_t blocks_of(const NoiseArguments& a) {
  return a.noise_std == 0.0 ? divide_up(a.stream.count, kNoiseThreads) : blocks_of(a.stream);
}

}  // namespace cuda
}  // namespace dpk
