// Runs the CUDA kernels on a CPU, thread by thread, so that their sums, indices and barriers are tested where there is
// no GPU. A block's threads are fibers of one system thread; at __syncthreads and at a shuffle each waits until all
// that take part have arrived. Nothing is known here of races between barriers, of coalescing or of speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct Dimension {
  unsigned x;
};
inline Dimension threadIdx, blockIdx;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline uint16_t __ushort_as_half(uint16_t bits) { return bits; }
inline float __half2float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(1024 + fraction), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}
// Upper 16 bits, to nearest even; any NaN becomes one.
inline uint16_t __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t __bfloat16_as_ushort(uint16_t bits) { return bits; }
inline uint16_t __half_as_ushort(uint16_t bits) { return bits; }
// To nearest even: rintf rounds in the steps that a half has at this magnitude.
inline uint16_t __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (value != value) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto steps = static_cast<int>(std::rint(std::ldexp(magnitude, 10 - exponent)));  // 1024 to 2048, if normal
  return static_cast<uint16_t>(sign | (steps < 1024 ? steps : ((exponent + 15) << 10) + (steps - 1024)));
}
// Rounds down; beyond int64 the nearest it can hold, NaN the smallest, as the instruction does.
inline long long __double2ll_rd(double value) {
  const double floored = std::floor(value);
  if (!(floored >= -0x1p63)) return INT64_MIN;
  return floored >= 0x1p63 ? INT64_MAX : static_cast<long long>(floored);
}

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = true;
  enum { running, at_block_barrier, at_warp_barrier } waits = running;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<double> slots;  // what each thread shows to its warp
  void (*body)() = nullptr;
  unsigned current = 0;
};
inline Block block;

inline void wait(decltype(Fiber::waits) where) {
  Fiber& fiber = block.fibers[block.current];
  fiber.waits = where;
  swapcontext(&fiber.context, &block.scheduler);
}

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

// True when every thread of [begin, end) that has not returned waits at `where`; lets them go on.
inline bool release(unsigned begin, unsigned end, decltype(Fiber::waits) where) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    if (block.fibers[i].done) continue;
    if (block.fibers[i].waits != where) return false;
    any = true;
  }
  for (unsigned i = begin; i < end; ++i) block.fibers[i].waits = Fiber::running;
  return any;
}

inline void run_block(unsigned threads) {
  if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
  block.slots.assign(threads, 0.0);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    fiber.waits = Fiber::running;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool ran = false, left = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[i];
      left = left || !fiber.done;
      if (fiber.done || fiber.waits != Fiber::running) continue;
      block.current = threadIdx.x = i;
      swapcontext(&block.scheduler, &fiber.context);
      ran = true;
    }
    if (!left) return;
    for (unsigned warp = 0; warp < threads; warp += kWarp) {
      ran = release(warp, warp + kWarp < threads ? warp + kWarp : threads, Fiber::at_warp_barrier) || ran;
    }
    ran = release(0, threads, Fiber::at_block_barrier) || ran;
    if (!ran) throw std::runtime_error("deadlock: the threads of a block wait at different barriers");
  }
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, const Arguments& arguments) {
  static void (*the_kernel)(Arguments);
  static const Arguments* the_arguments;
  the_kernel = kernel;
  the_arguments = &arguments;
  block.body = [] { the_kernel(*the_arguments); };
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    run_block(static_cast<unsigned>(threads));
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::Fiber::at_block_barrier); }

template <class Number>
Number __shfl_xor_sync(unsigned, Number value, int distance) {
  const unsigned self = threadIdx.x;
  emulated::block.slots[self] = double(value);  // exact for what the kernels shuffle: float and double
  emulated::wait(emulated::Fiber::at_warp_barrier);
  const auto seen = Number(emulated::block.slots[self ^ unsigned(distance)]);
  emulated::wait(emulated::Fiber::at_warp_barrier);
  return seen;
}
