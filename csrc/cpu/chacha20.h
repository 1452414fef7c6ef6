// The ChaCha20 block function (RFC 8439, section 2.3) for several consecutive blocks at once: lane l of every vector
// belongs to block first + l. State word 12 is the 32-bit counter, words 13 to 15 the nonce. The key stream is used
// as it comes, without encrypting anything.

struct ChaChaBlocks {
  vu word[16];
};

template <int bits>
DPK_INLINE vu rotate_left(vu value) {
#if defined(__AVX512F__)
  return as<vu>(_mm512_rol_epi32(as<__m512i>(value), bits));
#elif defined(__AVX2__)
  if constexpr (bits % 8 == 0) {  // whole bytes move: one shuffle
    alignas(32) int8_t from[32];
    for (int i = 0; i < 32; ++i) from[i] = int8_t(i % 16 / 4 * 4 + (i + 4 - bits / 8) % 4);
    return as<vu>(_mm256_shuffle_epi8(as<__m256i>(value), dpk_load<__m256i>(from)));
  }
#endif
#if !defined(__AVX512F__)
  return (value << bits) | (value >> (32 - bits));
#endif
}

DPK_INLINE void quarter_round(vu& a, vu& b, vu& c, vu& d) {
  a += b, d = rotate_left<16>(d ^ a);
  c += d, b = rotate_left<12>(b ^ c);
  a += b, d = rotate_left<8>(d ^ a);
  c += d, b = rotate_left<7>(b ^ c);
}

DPK_INLINE ChaChaBlocks chacha20_blocks(const ChaChaInput& input, uint32_t first) {
  vu state[16];
  const uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};  // "expand 32-byte k"
  for (int i = 0; i < 4; ++i) state[i] = vu{} + constants[i];
  for (int i = 0; i < 8; ++i) state[4 + i] = vu{} + input.key[i];
  uint32_t counter[W];
  for (int lane = 0; lane < W; ++lane) counter[lane] = first + uint32_t(lane);
  state[12] = dpk_load<vu>(counter);
  for (int i = 0; i < 3; ++i) state[13 + i] = vu{} + input.nonce[i];

  ChaChaBlocks blocks;
  vu* x = blocks.word;
  for (int i = 0; i < 16; ++i) x[i] = state[i];
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
  for (int i = 0; i < 16; ++i) x[i] += state[i];
  return blocks;
}

void words(uint64_t* out, const ChaChaInput& input, uint64_t first_block, int64_t blocks) {
  for (int64_t block = 0; block < blocks; block += W) {
    const ChaChaBlocks made = chacha20_blocks(input, uint32_t(first_block + uint64_t(block)));
    const int64_t lanes = blocks - block < W ? blocks - block : W;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < 8; ++i) {
        out[8 * (block + lane) + i] = uint64_t(made.word[2 * i][lane]) | uint64_t(made.word[2 * i + 1][lane]) << 32;
      }
    }
  }
}
