// Down in AMX tiles where a row of it is a channel, for bfloat16. A tile of weights then needs the
// channels in pairs. With many tokens a panel of weights, small enough for the L1 cache, is put so
// while the panel before is multiplied: the weights are read once for a group and never written
// back. With few tokens weights are multiplied as they lie, twice, see `meet_rows`.

#pragma once

#include "cpu_tiles.h"

namespace {

#if defined(__AMX_BF16__)
constexpr int DEEP = 64, WIDE = 64;  // channels and columns of a panel
constexpr int AS_THEY_LIE = TILE;    // tokens of a group up to which `meet_rows` multiplies

// 32 columns (`there` of them are there) of 16 rows (`count`), in pairs of rows, to two tiles: the
// lower and the upper halves of all quarters of 8. WHOLE: all are there
template <bool WHOLE>
__attribute__((noinline)) void pair_rows(const bf16* rows, int64_t stride, int count, int there,
                                         bf16* lower, bf16* upper) {
  const __mmask32 mask = there >= PAIRS ? ~0u : (1u << there) - 1;
  auto row = [&](int r) {
    if (WHOLE) return _mm512_loadu_si512(rows + r * stride);
    return _mm512_maskz_loadu_epi16(r < count ? mask : 0, rows + r * stride);
  };
  for (int r = 0; r < TILE; r += 2, lower += PAIRS, upper += PAIRS) {
    __m512i even = row(r), odd = row(r + 1);
    _mm512_store_si512(lower, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(upper, _mm512_unpackhi_epi16(even, odd));
  }
}

struct Panel {  // some channels and columns of down, how many are there, and which is next to pair
  const bf16* rows = nullptr;
  int64_t stride = 0;
  int channels = 0, columns = 0;
  int c = 0, j = 0;

  int deep() const { return up_to(channels, PAIRS); }
  int wide() const { return up_to(columns, PAIRS); }
  // Pairs 16 channels in 32 columns, if any are left, to: [columns / 16, deep / 32, a tile]
  bool pair(bf16* to) {
    if (c >= deep()) return false;
    const bf16* from = rows + c * stride + j;
    bf16 *lower = to + j * deep() + c * TILE, *upper = lower + deep() * TILE;
    if (channels - c >= TILE && columns - j >= PAIRS)
      pair_rows<true>(from, stride, TILE, PAIRS, lower, upper);
    else pair_rows<false>(from, stride, channels - c, columns - j, lower, upper);
    if (c % PAIRS == 0) return c += TILE, true;
    c -= TILE, j += PAIRS;
    if (j >= columns) j = 0, c += PAIRS;
    return true;
  }
};

// y = h . every other of 64 channels (`count` of them are there), or that is added, for 16 tokens. As
// weights lie, two columns are side by side where two channels should be, so a tile is multiplied
// twice: by activations with a zero after each, in which the left columns count, and with a zero
// before each, for the right ones. Every other channel, as a page of memory then has one row that is
// read, not two of 2 KiB; the others come next. And to the end of rows, though sums are loaded and
// stored for each 64 channels: both is faster.
inline void meet_rows(const bf16* rows, int64_t stride, int count, const bf16* others,
                      const bf16 (*left)[VALUES], const bf16 (*right)[VALUES], int cols, bool add,
                      float* y) {
  alignas(64) bf16 copy[VALUES];
  for (int j = 0; j < cols; j += PAIRS, y += 2 * TILE * TILE) {
    const bf16* next = j + PAIRS < cols ? rows + j + PAIRS : others;
    for (int r = 0; r < std::min(2 * TILE, count); r++)
      _mm_prefetch(next + r * stride, _MM_HINT_T0);
    if (add) {
      load_tile<0>(y, 64);
      load_tile<1>(y + TILE * TILE, 64);
    } else {
      zero_tile<0>();
      zero_tile<1>();
    }
    for (int i = 0; i < 2 && i * TILE < count; i++) {
      Source own = source(rows + i * TILE * stride, stride, count - i * TILE, j, cols, copy);
      load_tile<6>(own.from, own.bytes);
      load_tile<4>(left[i], 64);
      multiply_tiles<0, 4, 6>();
      load_tile<5>(right[i], 64);
      multiply_tiles<1, 5, 6>();
    }
    store_tile<0>(y, 64);
    store_tile<1>(y + TILE * TILE, 64);
  }
}

// As `tile_columns`, for up to 16 tokens
inline void columns_as_they_lie(const bf16* down, int64_t stride, int width, const bf16* h,
                                int cols, float* y) {
  alignas(64) bf16 left[2][VALUES], right[2][VALUES];
  const __m512i even = _mm512_set1_epi32(0xffff);
  for (int c = 0; c < width; c += 2 * PAIRS)
    for (int odd = 0; odd < 2; odd++) {
      for (int i = 0; i < 2 && c + i * PAIRS < width; i++)
        for (int m = 0; m < TILE; m++) {
          const int to = m * PAIRS;
          __m512i two = _mm512_loadu_si512(h + c * TILE + i * VALUES + to);
          __m512i one = odd ? _mm512_srli_epi32(two, 16) : _mm512_and_si512(two, even);
          _mm512_store_si512(left[i] + to, one);
          _mm512_store_si512(right[i] + to, _mm512_slli_epi32(one, 16));
        }
      const bf16* rows = down + (c + odd) * stride;
      const bf16* others = odd ? down + (c + 2 * PAIRS) * stride : rows + stride;
      const int count = (width - c - odd + 1) / 2;
      meet_rows(rows, 2 * stride, count, others, left, right, cols, c + odd > 0, y);
    }
}

// Outputs of n tokens in `cols` columns: y[cols / 32][half][n / 16][token][column], halves being left
// and right columns as they lie, else of `pair_rows`. h: tiles of 16 tokens and 32 channels
// (`tile_of`), [width / 32, n / 16, a tile].
inline void tile_columns(const bf16* down, int64_t stride, int width, const bf16* h, int n,
                         int cols, float* y) {
  if (!width) std::fill_n(y, up_to(cols, PAIRS) * up_to(n, TILE), 0.f);
  if (n <= AS_THEY_LIE) return columns_as_they_lie(down, stride, width, h, cols, y);
  constant<2, 6>(up_to(n, TILE) / TILE, [&](auto M) {
    alignas(64) bf16 panels[2][DEEP * WIDE];
    const int across = up_to(cols, WIDE) / WIDE, all = up_to(width, DEEP) / DEEP * across;
    auto at = [&](int i) {
      if (i >= all) return Panel();
      const int c = i / across * DEEP, j = i % across * WIDE;
      return Panel{down + c * stride + j, stride, std::min(DEEP, width - c),
                   std::min(WIDE, cols - j)};
    };
    Panel own = at(0);
    while (own.pair(panels[0])) {}
    for (int i = 0; i < all; i++) {
      const bf16 *panel = panels[i % 2], *act = h + i / across * DEEP * TILE * M;
      bf16* other = panels[(i + 1) % 2];
      Panel next = at(i + 1);
      const int deep = own.deep();
      for (int j = 0; j < own.wide(); j += TILE, panel += TILE * deep) {
        float* to = y + (i % across * WIDE + j) * TILE * M;
        meet<M, false>(act, deep, i >= across, to, TILE * TILE, 64, [&](int k) {
          next.pair(other);
          load_tile<6>(panel + k * TILE, 64);
        });
      }
      while (next.pair(other)) {}
      own = next;
    }
  });
}

// Adds what `tile_columns` has for token m of n to the columns of its row, and the bias if there is
// one
inline void add_tiled(const float* y, int n, int m, float weight, const bf16* bias, int cols,
                      float* to) {
  // Columns are in the two halves in turns: one by one as they lie, else in runs of 4
  alignas(64) int order[2][16];
  const int run = n <= AS_THEY_LIE ? 1 : 4;
  for (int i = 0; i < 16; i++)
    for (int half = 0; half < 2; half++)
      order[half][i] = 8 * half + i / (2 * run) * run + i % run + i / run % 2 * 16;
  const int next = up_to(n, TILE) * TILE;
  y += m * TILE;
  for (int j = 0; j < cols; j += PAIRS, y += 2 * next)
    for (int half = 0; half < 2; half++) {
      const int k = j + half * W, left = std::clamp(cols - k, 0, W);
      const __mmask16 there = (1u << left) - 1;
      F v = _mm512_permutex2var_ps(load(y), _mm512_load_si512(order[half]), load(y + next));
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
inline void add_tiled(const float*, int, int, float, const bf16*, int, float*) {}
#endif

}  // namespace
