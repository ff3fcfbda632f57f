// Blocks in AMX tiles, for bfloat16: 16 rows of weights meet up to 96 tokens, 32 values at a time.
// A tile of weights is loaded as it lies in memory; what meets it is put in pairs once for many rows.

#pragma once

#include "cpu_amx.h"
#include "cpu_vectors.h"

namespace {

constexpr int TILE = 16;           // rows of a tile, and sums or pairs of values in a row
constexpr int TOGETHER = 6 * TILE;  // tokens of a group at most: two tiles are left for operands

#if defined(__AMX_BF16__)
constexpr int TILES_FROM = 3;  // tokens of a group; measured
constexpr int PAIRS = 32;      // values of a row of it
constexpr int VALUES = TILE * PAIRS;

// All eight tiles of a thread are 16 rows of 64 bytes as long as this lives
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = TILE;
    configure_tiles(config);
  }
  ~Tiles() { release_tiles(); }
};

struct Source {
  const void* from;
  int64_t bytes;  // from one row to the next
};

// Where a tile of weights is read: where they are, or at the end of rows or of a row from a copy
// with zeros in the place of what is not theirs
inline Source source(const bf16* rows, int64_t stride, int count, int k, int K, bf16* copy) {
  if (count >= TILE && k + PAIRS <= K) return {rows + k, stride * 2};
  std::memset(copy, 0, VALUES * 2);
  for (int r = 0; r < std::min(count, TILE); r++)
    std::memcpy(copy + r * PAIRS, rows + r * stride + k, std::min(PAIRS, K - k) * 2);
  return {copy, PAIRS * 2};
}

// Calls `run` with 0 to N - 1 as constants
template <int N, class Run>
void each(Run run) {
  if constexpr (N > 1) each<N - 1>(run);
  run(Constant<N - 1>());
}

// M tiles of sums = weights . x, or that is added: `load` brings the weights of 32 values from k on to
// tile 6, and x has M tiles for those. The sums are [weights, tokens] if ROWS, else [tokens, weights];
// a tile of them begins `step` floats after the one before, and has rows `bytes` apart.
template <int M, bool ROWS, class Load>
void meet(const bf16* x, int K, bool add, float* sums, int step, int64_t bytes, Load load) {
  if (add) each<M>([&](auto i) { load_tile<i>(sums + i * step, bytes); });
  else each<M>([&](auto i) { zero_tile<i>(); });
  for (int k = 0; k < K; k += PAIRS, x += M * VALUES) {
    load(k);
    each<M>([&](auto i) {
      load_tile<7>(x + i * VALUES, 64);
      multiply_tiles<i, ROWS ? 6 : 7, ROWS ? 7 : 6>();
    });
  }
  each<M>([&](auto i) { store_tile<i>(sums + i * step, bytes); });
}

// Of 16 rows, `count` of which are there. With several tiles of tokens the next tile of weights is
// asked for before: while one waits for memory, little can be computed.
template <int M>
void tile_rows(const bf16* rows, int64_t stride, int count, const bf16* x, int K, bool add,
               float* out, int ld) {
  alignas(64) bf16 copy[VALUES];
  meet<M, true>(x, K, add, out, TILE, ld * 4, [&](int k) {
    for (int r = 0; M > 1 && r < TILE; r++)
      _mm_prefetch(rows + r * stride + k + PAIRS, _MM_HINT_T0);
    Source own = source(rows, stride, count, k, K, copy);
    load_tile<6>(own.from, own.bytes);
  });
}

// As `products`, but added only where that is said: the tokens in pairs (`pair_tokens`), out
// [count, n rounded up to 16]; rows are written 16 at a time
inline void tile_products(const bf16* rows, int64_t stride, int count, const bf16* x, int n, int K,
                          bool add, float* out) {
  const int ld = up_to(n, TILE);
  constant<1, 6>(ld / TILE, [&](auto M) {
    for (int r = 0; r < count; r += TILE)
      tile_rows<M>(rows + r * stride, stride, count - r, x, K, add, out + r * ld, ld);
  });
}

// 16 rows of 16 values of 32 bits to columns
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Rows of tokens, padded with zeros to a multiple of 32, to tiles: [K / 32, n / 16, 16, 16, 2]
inline void pair_tokens(const bf16* const* token, int n, int K, bf16* to) {
  for (int k = 0; k < K; k += PAIRS)
    for (int m0 = 0; m0 < n; m0 += TILE, to += VALUES) {
      __m512i r[16];
      for (int i = 0; i < 16; i++)
        r[i] = m0 + i < n ? _mm512_loadu_si512(token[m0 + i] + k) : _mm512_setzero_si512();
      transpose(r);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * PAIRS, r[i]);
    }
}

// Activations [32, ld] of 16 tokens to one tile: in pairs as above, or [16, 32], a token a row
inline void tile_of(const float* h, int ld, bool pairs, bf16* to) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) {
    auto half = [&](int row) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(h + row * ld)));
    };
    r[i] = _mm512_or_si512(half(2 * i), _mm512_slli_epi32(half(2 * i + 1), 16));
  }
  if (!pairs) transpose(r);
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * PAIRS, r[i]);
}
#else  // no group is computed in tiles
constexpr int TILES_FROM = 1 << 30;
struct Tiles {
  Tiles() {}
};
inline void tile_products(const bf16*, int64_t, int, const bf16*, int, int, bool, float*) {}
inline void pair_tokens(const bf16* const*, int, int, bf16*) {}
inline void tile_of(const float*, int, bool, bf16*) {}
#endif

}  // namespace
