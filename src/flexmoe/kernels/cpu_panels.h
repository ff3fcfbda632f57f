// Down in AMX tiles where a row of it is a channel, for bfloat16. A tile of weights then needs the
// channels in pairs. They are put so 32 columns of some rows at a time, in the L1 cache, while the
// columns before are multiplied: the weights stream from memory once, many rows side by side, which
// is how memory is fastest, and are never written back.

#pragma once

#include "cpu_tiles.h"

namespace {

#if defined(__AMX_BF16__)
constexpr int DEEP = 64;             // channels at a time
constexpr int PANEL = DEEP * PAIRS;  // the values of a panel: 32 columns of them
constexpr int BLOCK = 2 * TILE * TILE;  // results of 16 tokens in 32 columns: two tiles

// Columns (`there` of 32) of 32 rows (`count` of them are there) to the lower and upper halves of
// all quarters of 8, in pairs of rows: [16, 2, 16, 2]. WHOLE: all are there
template <bool WHOLE>
void pair_rows(const bf16* rows, int64_t stride, int count, int there, bf16* to) {
  const __mmask32 mask = there >= PAIRS ? ~0u : (1u << there) - 1;
  auto row = [&](int r) {
    if (WHOLE) return _mm512_loadu_si512(rows + r * stride);
    return _mm512_maskz_loadu_epi16(r < count ? mask : 0, rows + r * stride);
  };
  for (int r = 0; r < PAIRS; r += 2, to += 2 * PAIRS) {
    __m512i even = row(r), odd = row(r + 1);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(to + PAIRS, _mm512_unpackhi_epi16(even, odd));
  }
}

struct Panel {  // of down: where 32 columns begin, and how many rows and columns there are
  const bf16* rows;
  int64_t stride;
  int count, there;

  void pair(int c, bf16* to) const {
    const bf16* from = rows + c * stride;
    if (count - c >= PAIRS && there >= PAIRS) pair_rows<true>(from, stride, PAIRS, PAIRS, to);
    else pair_rows<false>(from, stride, count - c, there, to);
  }
};

// y += h . panel for 16 tokens or (TWO) 32; meanwhile, if there is a `next` panel, that is paired
template <bool TWO>
void meet_panel(const bf16* h, int64_t h_block, const bf16* panel, int deep, float* y,
                int64_t y_block, const Panel* next, bf16* to) {
  _tile_loadd(0, y, 64);
  _tile_loadd(1, y + BLOCK / 2, 64);
  if (TWO) {
    _tile_loadd(2, y + y_block, 64);
    _tile_loadd(3, y + y_block + BLOCK / 2, 64);
  }
  for (int c = 0; c < deep; c += PAIRS) {
    if (next) next->pair(c, to + c * PAIRS);
    _tile_loadd(4, h + c * TILE, 64);
    _tile_loadd(6, panel + c * PAIRS, 128);
    _tile_loadd(7, panel + c * PAIRS + PAIRS, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, h + h_block + c * TILE, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, 64);
  _tile_stored(1, y + BLOCK / 2, 64);
  if (TWO) {
    _tile_stored(2, y + y_block, 64);
    _tile_stored(3, y + y_block + BLOCK / 2, 64);
  }
}

// Outputs of n tokens in `cols` columns: y[16 tokens][32 columns][half][token][column]. h: tiles of
// 16 tokens and 32 channels (`tile_of`), those of the same tokens one after the other
inline void tile_columns(const bf16* down, int64_t stride, int width, const bf16* h, int n,
                         int cols, float* y) {
  alignas(64) bf16 panels[2][PANEL];
  const int64_t h_block = int64_t(up_to(width, PAIRS)) * TILE;
  const int64_t y_block = int64_t(up_to(cols, PAIRS)) * TILE;
  std::fill_n(y, up_to(n, TILE) / TILE * y_block, 0.f);
  for (int c0 = 0; c0 < width; c0 += DEEP) {
    const int count = std::min(DEEP, width - c0), deep = up_to(count, PAIRS);
    auto at = [&](int j) { return Panel{down + c0 * stride + j, stride, count, cols - j}; };
    for (int c = 0; c < deep; c += PAIRS) at(0).pair(c, panels[0] + c * PAIRS);
    for (int j = 0; j < cols; j += PAIRS) {
      bf16 *panel = panels[j / PAIRS % 2], *other = panels[j / PAIRS % 2 ^ 1];
      const Panel after = at(j + PAIRS), *next = j + PAIRS < cols ? &after : nullptr;
      for (int m = 0; m < n; m += 2 * TILE, next = nullptr) {
        const bf16* own = h + m / TILE * h_block + c0 * TILE;
        float* to = y + m / TILE * y_block + j * TILE;
        if (n - m > TILE)
          meet_panel<true>(own, h_block, panel, deep, to, y_block, next, other);
        else meet_panel<false>(own, h_block, panel, deep, to, y_block, next, other);
      }
    }
  }
}

// Adds what `tile_columns` has for token m to the columns of its row, and the bias if there is one
inline void add_tiled(const float* y, int m, float weight, const bf16* bias, int cols, float* to) {
  alignas(64) int order[2][16];  // halves of quarters back to where they were
  for (int i = 0; i < 16; i++)
    for (int half = 0; half < 2; half++)
      order[half][i] = 8 * half + i / 8 * 4 + i % 4 + (i % 8 >= 4 ? 16 : 0);
  y += m / TILE * int64_t(up_to(cols, PAIRS)) * TILE + m % TILE * TILE;
  for (int j = 0; j < cols; j += PAIRS, y += BLOCK)
    for (int half = 0; half < 2; half++) {
      const int k = j + half * W, left = std::clamp(cols - k, 0, W);
      const __mmask16 there = (1u << left) - 1;
      F v = _mm512_permutex2var_ps(load(y), _mm512_load_si512(order[half]), load(y + BLOCK / 2));
      if (bias) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias + k));
        v = add(v, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
      }
      _mm512_mask_storeu_ps(to + k, there,
                            fma(set1(weight), v, _mm512_maskz_loadu_ps(there, to + k)));
    }
}
#else
inline void tile_columns(const bf16*, int64_t, int, const bf16*, int, int, float*) {}
inline void add_tiled(const float*, int, float, const bf16*, int, float*) {}
#endif

}  // namespace
