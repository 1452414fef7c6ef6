// Vectors as the compiler's own vector types; W floats is the register of the width this file is compiled for.
// Loops that add are written for 16 float lanes (8 double lanes), whatever the register, so that every width adds in the
// same order and gives the same bits. Included by kernels*.cpp only, inside the namespace of one width.

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int kLanes = 16;
constexpr int D = W / 2;       // doubles in a register

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vfd __attribute__((vector_size(4 * D)));
typedef uint32_t vud __attribute__((vector_size(4 * D)));
typedef double vd __attribute__((vector_size(8 * D)));
typedef int64_t vl __attribute__((vector_size(8 * D)));
typedef uint64_t vul __attribute__((vector_size(8 * D)));

#define DPK_INLINE inline __attribute__((always_inline))

template <class V>
DPK_INLINE V dpk_load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
DPK_INLINE void dpk_store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// Bits of one register read as another kind of lane.
template <class To, class From>
DPK_INLINE To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same register");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

DPK_INLINE vd splat(double value) { return value - vd{}; }

// The tree over eight lanes: neighbours, pairs of neighbours, halves. The same bits on every width.
template <class Number>
DPK_INLINE Number tree_sum8(const Number (&lane)[8]) {
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}
