// A plain read of memory, the yardstick of the bandwidth benches: every byte is loaded once and folded into one word.
#include <cstddef>
#include <cstdint>
#include <cstring>

typedef uint64_t v4 __attribute__((vector_size(32)));

#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target_clones("avx2", "default")))
#endif
uint64_t fold_bytes(const char* from, int64_t bytes) {
  v4 fold[8] = {};
  int64_t at = 0;
  for (; at + 256 <= bytes; at += 256) {
    for (int i = 0; i < 8; ++i) {
      v4 value;
      std::memcpy(&value, from + at + 32 * i, 32);
      fold[i] ^= value;
    }
  }
  uint64_t result = 0;
  for (const v4& part : fold) result ^= part[0] ^ part[1] ^ part[2] ^ part[3];
  for (; at < bytes; ++at) result ^= static_cast<unsigned char>(from[at]);
  return result;
}
