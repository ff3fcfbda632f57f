// Blocks in AMX tiles, for bfloat16: 16 rows of weights meet 16 tokens, 32 values at a time. A tile
// of weights is loaded as it lies in memory; what meets it is put in pairs once for many rows.

#pragma once

#include "cpu_vectors.h"

namespace {

#if defined(__AMX_BF16__)
constexpr int TILES_FROM = 4;  // tokens of a group; measured
constexpr int TILE = 16;  // rows of a tile
constexpr int PAIRS = 32;  // values of a row of it
constexpr int DEEP = 256;  // channels of down put in pairs at a time: they stay in the L2 cache
constexpr int PANEL = DEEP * PAIRS + 64;  // no power of two, or panels would meet in the L1 cache

inline int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// All eight tiles of a thread are 16 rows of 64 bytes as long as this lives
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = TILE;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

struct Source {
  const void* from;
  int64_t bytes;  // from one row to the next
};

// Where a tile of weights is read: where they are, or at the end of rows or of a row from a copy
// with zeros in the place of what is not theirs
inline Source source(const bf16* rows, int64_t stride, int count, int k, int K, bf16* copy) {
  if (count >= TILE && k + PAIRS <= K) return {rows + k, stride * 2};
  std::memset(copy, 0, TILE * PAIRS * 2);
  for (int r = 0; r < std::min(count, TILE); r++)
    std::memcpy(copy + r * PAIRS, rows + r * stride + k, std::min(PAIRS, K - k) * 2);
  return {copy, PAIRS * 2};
}

// out[r][m] += row r . token m, for 32 rows (count of them are there) and 16 tokens or (TWO) 32
template <bool TWO>
void meet(const bf16* rows, int64_t stride, int count, const bf16* x, int64_t x_block, int K,
          float* out, int ld) {
  alignas(64) bf16 copy[2][TILE * PAIRS];
  float* below = out + TILE * ld;
  _tile_loadd(0, out, ld * 4);
  _tile_loadd(1, below, ld * 4);
  if (TWO) {
    _tile_loadd(2, out + TILE, ld * 4);
    _tile_loadd(3, below + TILE, ld * 4);
  }
  for (int k = 0; k < K; k += PAIRS) {
    Source first = source(rows, stride, count, k, K, copy[0]);
    Source second = source(rows + TILE * stride, stride, count - TILE, k, K, copy[1]);
    _tile_loadd(4, first.from, first.bytes);
    _tile_loadd(5, second.from, second.bytes);
    _tile_loadd(6, x + k * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (TWO) {
      _tile_loadd(7, x + x_block + k * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, ld * 4);
  _tile_stored(1, below, ld * 4);
  if (TWO) {
    _tile_stored(2, out + TILE, ld * 4);
    _tile_stored(3, below + TILE, ld * 4);
  }
}

// As `products`; the tokens in pairs (`pair_tokens`), out [32, n rounded up to 16], count <= 32
inline void tile_products(const bf16* rows, int64_t stride, int count, const bf16* x, int n, int K,
                          float* out) {
  const int ld = up_to(n, TILE);
  const int64_t x_block = int64_t(up_to(K, PAIRS)) * TILE;
  for (int m = 0; m < n; m += 2 * TILE) {
    const bf16* tokens = x + m / TILE * x_block;
    if (n - m > TILE) meet<true>(rows, stride, count, tokens, x_block, K, out + m, ld);
    else meet<false>(rows, stride, count, tokens, x_block, K, out + m, ld);
  }
}

// Rows of tokens, padded with zeros to a multiple of 32, to blocks of 16 tokens: [K / 2, 16, 2]
inline void pair_tokens(const bf16* const* token, int n, int K, bf16* to) {
  for (int m0 = 0; m0 < n; m0 += TILE)
    for (int k = 0; k < K; k += PAIRS, to += TILE * PAIRS) {
      __m512i r[16], t[16];
      for (int i = 0; i < 16; i++)
        r[i] = m0 + i < n ? _mm512_loadu_si512(token[m0 + i] + k) : _mm512_setzero_si512();
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
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * PAIRS, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(to + (4 + j) * PAIRS, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512(to + (8 + j) * PAIRS, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * PAIRS, _mm512_shuffle_i32x4(b, d, 0xdd));
      }
    }
}

// Activations [32, ld] to the same form: the block of 16 tokens at m
inline void pair_channels(const float* h, int ld, bf16* to) {
  for (int c = 0; c < PAIRS; c += 2, to += PAIRS) {
    auto half = [&](int row) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(h + row * ld)));
    };
    _mm512_storeu_si512(to, _mm512_or_si512(half(c), _mm512_slli_epi32(half(c + 1), 16)));
  }
}

// Rows c0 to c0 + count of down, `cols` columns, to panels of 32 columns: [c / 2, 32, 2] each
inline void pair_rows(const bf16* down, int64_t stride, int count, int cols, bf16* to) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 16; i++)
    for (int half = 0; half < 2; half++)
      order[half][2 * i] = 16 * half + i, order[half][2 * i + 1] = 32 + 16 * half + i;
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int c = 0; c < up_to(count, PAIRS); c += 2)
    for (int j = 0; j < cols; j += PAIRS) {
      const __mmask32 there = cols - j >= PAIRS ? ~0u : (1u << (cols - j)) - 1;
      auto row = [&](int r) {
        return _mm512_maskz_loadu_epi16(r < count ? there : 0, down + r * stride + j);
      };
      __m512i even = row(c), odd = row(c + 1);
      bf16* at = to + j / PAIRS * PANEL + c * PAIRS;
      _mm512_storeu_si512(at, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(at + PAIRS, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// y[m][j] += h[m] . column j of a panel, for 16 tokens or (TWO) 32, and 32 columns
template <bool TWO>
void meet_panel(const bf16* h, int64_t h_row, int deep, const bf16* panel, float* y, int ld) {
  float* below = y + TILE * ld;
  _tile_loadd(0, y, ld * 4);
  _tile_loadd(1, y + TILE, ld * 4);
  if (TWO) {
    _tile_loadd(2, below, ld * 4);
    _tile_loadd(3, below + TILE, ld * 4);
  }
  for (int k = 0; k < deep; k += PAIRS) {
    _tile_loadd(4, h + k, h_row * 2);
    _tile_loadd(6, panel + k * PAIRS, 128);
    _tile_loadd(7, panel + k * PAIRS + PAIRS, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, h + TILE * h_row + k, h_row * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, ld * 4);
  _tile_stored(1, y + TILE, ld * 4);
  if (TWO) {
    _tile_stored(2, below, ld * 4);
    _tile_stored(3, below + TILE, ld * 4);
  }
}

// y[m][j] += sum over channels of h * down, for n tokens (rows of h: a multiple of 16) and columns
inline void tile_columns(const bf16* down, int64_t stride, int width, const bf16* h, int64_t h_row,
                         int n, int cols, Buffer<float>& buffer, float* y, int ld) {
  buffer.resize(std::max<size_t>(buffer.size(), up_to(cols, PAIRS) / PAIRS * PANEL / 2));
  bf16* panels = (bf16*)buffer.data();
  for (int c0 = 0; c0 < width; c0 += DEEP) {
    const int count = std::min(DEEP, width - c0), deep = up_to(count, PAIRS);
    pair_rows(down + c0 * stride, stride, count, cols, panels);
    for (int j = 0; j < cols; j += PAIRS)
      for (int m = 0; m < n; m += 2 * TILE) {
        const bf16 *own = h + m * h_row + c0, *panel = panels + j / PAIRS * PANEL;
        if (n - m > TILE) meet_panel<true>(own, h_row, deep, panel, y + m * ld + j, ld);
        else meet_panel<false>(own, h_row, deep, panel, y + m * ld + j, ld);
      }
  }
}
#else  // no group is computed in tiles
constexpr int TILES_FROM = 1 << 30;
struct Tiles {
  Tiles() {}
};
inline void tile_products(const bf16*, int64_t, int, const bf16*, int, int, float*) {}
inline void pair_tokens(const bf16* const*, int, int, bf16*) {}
inline void pair_channels(const float*, int, bf16*) {}
inline void tile_columns(const bf16*, int64_t, int, const bf16*, int64_t, int, int,
                         Buffer<float>&, float*, int) {}
#endif

}  // namespace
