// Ragged experts on the CPU: gate, up, activation and down of every routed pair, each expert cut
// to a width of its own. Weights are float32 or bfloat16, sums are float32.
//
// Two passes, both memory-bound when an expert has few tokens and arithmetic-bound when it has
// many. First the channels: a channel's gate and up are rows of length H, and so are the tokens, so
// four rows, far apart in memory, meet three tokens in twelve dot products held in registers. Then
// the outputs: every thread owns a block of columns of the result and adds up all experts there, so
// nothing is shared and the order of sums does not depend on the number of threads. In ragged
// storage a row of down is a channel, which adds to all columns: outputs of experts of few tokens
// are made of whole rows before, and added up with the rest. In the storage of transformers a row is
// a column, and its product with the activations is a dot product again.
//
// In bfloat16 an expert of some tokens is computed in AMX tiles in both passes, where there are any.
//
// cpu.py compiles it for the instruction set at hand: AVX2 with FMA, AVX512 with BF16, or also AMX.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu_blocks.h"
#include "cpu_layer.h"
#include "cpu_panels.h"

namespace {

constexpr int CHANNELS = 32;   // of a piece of work in the first pass
constexpr int COLUMNS = 2048;  // of one in the second pass
template <class T>  // tokens of a group for which panels of down do not pay
constexpr int FEW = Row<T>::PARTS == 2 ? 20 : 8;
static_assert(CHANNELS == 32, "tiles of activations have so many");
static_assert(COLUMNS % (2 * W) == 0, "only the last columns of a row are computed one by one");
static_assert(sizeof(Stored) == 112 && sizeof(Call) == 96, "cpu.py packs these");

// Memory of a call, kept for the next: a new page costs as much as reading it several times
template <class T>
struct Scratch {
  using X = typename Row<T>::X;
  static constexpr size_t KEPT = 1 << 25;  // bytes of a buffer
  Buffer<float> sums, channels, parts;
  Buffer<X> x, tokens;

  void free_large() {
    if (sums.capacity() * sizeof(float) > KEPT) Buffer<float>().swap(sums);
    if (channels.capacity() * sizeof(float) > KEPT) Buffer<float>().swap(channels);
    if (parts.capacity() * sizeof(float) > KEPT) Buffer<float>().swap(parts);
    if (x.capacity() * sizeof(X) > KEPT) Buffer<X>().swap(x);
    if (tokens.capacity() * sizeof(X) > KEPT) Buffer<X>().swap(tokens);
  }
};

// Activations of all groups: a channel a row, or a token a row, padded with zeros and arranged as x
// is, or tiles of 16 tokens and 32 channels
template <class T>
struct Activations {
  Buffer<float>& channels;
  Buffer<typename Row<T>::X>& tokens;

  Activations(const Layer& a, std::vector<Group>& groups, Scratch<T>& scratch)
      : channels(scratch.channels), tokens(scratch.tokens) {
    int64_t c = 0, t = 0;
    for (Group& g : groups) {
      int64_t& end = by_token(a, g) ? t : c;
      g.h = end;
      end += (by_token(a, g) ? row(g) : int64_t(g.width)) * g.padded();
      end = up_to(end, 32);  // to a cache line
    }
    fit(channels, c);
    fit(tokens, t);
  }
  static bool by_token(const Layer& a, const Group& g) { return a.columns_are_rows() || g.tiles; }
  static int64_t row(const Group& g) { return up_to(g.width, Row<T>::N); }
};

// First pass: activations of channels c0 to c1 for the tokens of a group; `paired`: those of its
// tokens if it is computed in tiles
template <class T>
void activate_channels(const Layer& a, const Group& g, const int32_t* pair, const typename Row<T>::X* x,
              int64_t x_row, const bf16* paired, int c0, int c1, Activations<T>& h) {
  using X = typename Row<T>::X;
  constexpr int N = Row<T>::N;
  const int n = g.n, ld = g.padded(), count = c1 - c0;
  const X* token[TOGETHER];
  alignas(64) float part[2 * CHANNELS * TOGETHER];
  for (int m = 0; m < n && !g.tiles; m++) token[m] = x + pair[g.start + m] / a.K * x_row;
  // Where tiles write all rows themselves, nothing has to be there before
  const bool fill = !g.tiles || a.up_bias || count < TILE;
  for (int side = 0; side < a.sides; side++) {
    const T* bias = a.of<T>(a.up_bias, a.bias_by, g.expert) + side * a.bias_by.within;
    for (int c = fill ? 0 : count; c < CHANNELS; c++) {
      bool biased = a.up_bias && c < count;
      float value = biased ? widen(bias[(c0 + c) * a.bias_by.channel]) : 0.f;
      std::fill_n(part + (side * CHANNELS + c) * ld, ld, value);
    }
  }
  const int64_t stride = a.up_by.channel, side = a.up_by.within;
  const T* rows = a.of<T>(a.up, a.up_by, g.expert) + c0 * stride;
  const int together = side == a.H ? a.sides : 1;  // gate and up side by side in memory
  for (int s = 0; !g.tiles && s < a.sides; s += together)
    products<T>(rows + s * side, stride, side, together, count, g.width - c0 - count, token, n, a.H,
                part + s * CHANNELS * ld, CHANNELS * ld);
  for (int i = 0; g.tiles && i < count; i += TILE)
    for (int s = 0; s < a.sides; s++) {
      const int c = fill ? i : std::min(i, count - TILE);  // some rows twice, not a copy of the last
      tile_products((const bf16*)rows + c * stride + s * side, stride, std::min(TILE, count - c),
                    paired, n, a.H, fill, part + (s * CHANNELS + c) * ld);
    }
  const float* up = a.sides == 2 ? part + CHANNELS * ld : nullptr;
  if (!h.by_token(a, g))
    return activate(a.activation, part, up, &h.channels[g.h + int64_t(c0) * n], count * n);
  activate(a.activation, part, up, part, count * ld);
  X* to = &h.tokens[g.h];
  if (g.tiles) {
    for (int m = 0; m < n; m += 16)
      tile_of(part + m, ld, a.columns_are_rows(), (bf16*)to + (c0 * ld + m * 32));
    return;
  }
  for (int m = 0; m < n; m++)
    for (int c = 0; c < count; c += N) {
      float block[N];
      for (int i = 0; i < N; i++) block[i] = c + i < count ? part[(c + i) * ld + m] : 0.f;
      Row<T>::arrange(block, to + m * h.row(g) + c0 + c);
    }
}

// Adds outputs of a group, y[m][j], to those of its tokens
void add_weighted(const Layer& a, const Group& g, const int32_t* pair, const float* y, int by_m,
                  int by_j, int j0, int cols) {
  for (int m = 0; m < g.n; m++) {
    int s = pair[g.start + m];
    float* to = a.out + int64_t(s / a.K) * a.H + j0;
    for (int j = 0; j < cols; j++) to[j] += a.weight[s] * y[m * by_m + j * by_j];
  }
}

// Second pass where a row of down is a column of the outputs: columns j0 to j1
template <class T>
void outputs_by_rows(const Layer& a, const std::vector<Group>& groups, const int32_t* pair,
          const Activations<T>& h, int j0, int j1) {
  alignas(64) float y[CHANNELS * TOGETHER];
  for (const Group& g : groups) {
    const int n = g.n, ld = g.padded();
    const typename Row<T>::X *own = h.tokens.data() + g.h, *token[TOGETHER];
    const bf16* tiles = (const bf16*)own;
    for (int m = 0; m < n; m++) token[m] = own + m * h.row(g);
    const T* down = a.of<T>(a.down, a.down_by, g.expert);
    const T* bias = (const T*)a.down_bias + int64_t(g.expert) * a.H;
    for (int j = j0; j < j1; j += CHANNELS) {
      const int count = std::min(CHANNELS, j1 - j);
      for (int i = 0; i < CHANNELS; i++)
        std::fill_n(y + i * ld, ld, a.down_bias && i < count ? widen(bias[j + i]) : 0.f);
      const int64_t stride = a.down_by.within;
      const T* row = down + j * stride;
      if (g.tiles) tile_products((const bf16*)row, stride, count, tiles, n, g.width, true, y);
      else products<T>(row, stride, 0, 1, count, a.H - j - count, token, n, g.width, y, 0);
      add_weighted(a, g, pair, y, 1, ld, j, count);
    }
  }
}

// Where a row of down is a channel: outputs of groups of few tokens, in parts of some channels each,
// so that threads share out whole rows and not columns of all of them. With columns two threads took
// 1.1 to 2.2 times as long for one and eight tokens: processors fetch ahead what other threads need.
template <class T>
struct Parts {
  struct Part {
    int group, c0, count;
    int64_t y;  // where it begins: [n, columns], in the order of `half`
  };
  const Layer& a;
  const int columns = a.H / (2 * W) * (2 * W);
  std::vector<Part> all;
  Buffer<float>& y;

  Parts(const Layer& a, std::vector<Group>& groups, Scratch<T>& scratch) : a(a), y(scratch.parts) {
    int64_t end = 0;
    for (size_t i = 0; i < groups.size(); i++) {
      Group& g = groups[i];
      g.part = all.size();
      const int most = std::max(128, 64 * g.n);  // so that what is added up is little beside rows
      for (int c = 0; is_in(g) && c < g.width; c += most, end += int64_t(g.n) * columns)
        all.push_back({int(i), c, std::min(most, g.width - c), end});
    }
    fit(y, end);
  }
  bool is_in(const Group& g) const { return !a.columns_are_rows() && !g.tiles && g.n <= FEW<T>; }

  void compute(const Part& p, const Group& g, const Activations<T>& h) {
    const int64_t stride = a.down_by.channel;
    const T* down = a.of<T>(a.down, a.down_by, g.expert) + p.c0 * stride;
    float* to = y.data() + p.y;
    std::fill_n(to, g.n * columns, 0.f);
    add_rows(down, stride, p.count, &h.channels[g.h + p.c0 * g.n], g.n, columns, to, columns);
  }
  // to[m][0:cols] += columns j and on of the outputs of a group
  void add_up(const Group& g, int j, int cols, float* to, int ld) const {
    for (int c = 0, i = g.part; c < g.width; c += all[i++].count)
      for (int m = 0; m < g.n; m++) {
        const float* from = &y[all[i].y + m * columns + j];
        for (int k = 0; k < cols; k++) to[m * ld + k] += from[k];
      }
  }
};

// Second pass where a row of down is a channel: columns j0 to j1
template <class T>
void outputs_by_channels(const Layer& a, const std::vector<Group>& groups, const int32_t* pair,
                         const Activations<T>& all, const Parts<T>& parts, int j0, int j1) {
  const int cols = j1 - j0, whole = cols / (2 * W) * (2 * W);
  const int ld = whole + 2 * W;  // also so that rows are not pages apart
  int most = 0;
  for (const Group& g : groups) most = std::max(most, g.padded());
  thread_local Buffer<float> y, packed;
  fit(y, most * ld);
  fit(packed, most > FEW<T> ? PANEL * whole : 0);
  for (const Group& g : groups) {
    const T* down = a.of<T>(a.down, a.down_by, g.expert) + j0;
    const T* bias = a.down_bias ? (const T*)a.down_bias + int64_t(g.expert) * a.H + j0 : nullptr;
    const int64_t stride = a.down_by.channel;
    const int n = g.n;
    if (g.tiles) {
      const bf16* own = (const bf16*)all.tokens.data() + g.h;
      tile_columns((const bf16*)down, stride, g.width, own, n, cols, y.data());
      for (int m = 0; m < n; m++) {
        int s = pair[g.start + m];
        float* to = a.out + int64_t(s / a.K) * a.H + j0;
        add_tiled(y.data(), n, m, a.weight[s], (const bf16*)bias, cols, to);
      }
      continue;
    }
    const float* h = all.channels.data() + g.h;
    std::fill_n(y.begin(), n * ld, 0.f);
    if (parts.is_in(g)) parts.add_up(g, j0, whole, y.data(), ld);
    else add_panels(down, stride, g.width, h, n, whole, packed.data(), y.data(), ld);
    for (int m = 0; m < n; m++) {
      float* to = &y[m * ld];
      for (int j = 0; j < whole; j += 2 * W) in_order<T>(to + j);
      for (int c = 0; c < g.width && whole < cols; c++)
        for (int j = whole; j < cols; j++) to[j] += h[c * n + m] * widen(down[c * stride + j]);
      for (int j = 0; j < cols && bias; j++) to[j] += widen(bias[j]);
    }
    add_weighted(a, g, pair, y.data(), ld, 1, j0, cols);
  }
}

template <class T>
void experts(const Layer& given) {
  using X = typename Row<T>::X;
  thread_local Scratch<T> kept;
  Scratch<T>& scratch = kept;  // of this thread in all of them
  Layer a = given;
  fit(scratch.sums, a.x_bf16 ? int64_t(a.T) * a.H : 0);
  if (a.x_bf16) a.out = scratch.sums.data();
  std::vector<int32_t> pair;
  std::vector<Group> groups;
  sort_pairs(a, pair, groups);
  struct Piece {
    int group, c0;
  };
  std::vector<Piece> pieces;
  for (size_t g = 0; g < groups.size(); g++)
    for (int c = 0; c < groups[g].width; c += CHANNELS) pieces.push_back({int(g), c});
  const int64_t x_row = up_to(a.H, Row<T>::N);
  const bool as_given = Row<T>::PARTS == 1 && a.x_bf16 == (sizeof(X) == 2) && x_row == a.H;
  fit(scratch.x, as_given ? 0 : a.T * x_row);
  const X* const x = as_given ? (const X*)a.x : scratch.x.data();
  Activations<T> h(a, groups, scratch);
  Parts<T> parts(a, groups, scratch);
  const int per_thread = up_to((a.H + a.threads - 1) / a.threads, 2 * W);
  const int block = std::min(COLUMNS, per_thread);
#pragma omp parallel num_threads(a.threads)
  {
    Tiles tiles;
    thread_local Buffer<bf16> paired;
    int is_paired = -1;
#pragma omp for
    for (int t = 0; t < (as_given ? 0 : a.T); t++) {
      int64_t bytes = int64_t(t) * a.H * (a.x_bf16 ? 2 : 4);
      arrange_row<T>((const char*)a.x + bytes, a.x_bf16, &scratch.x[t * x_row], a.H);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < pieces.size(); i++) {
      const Group& g = groups[pieces[i].group];
      if (g.tiles && is_paired != pieces[i].group) {
        is_paired = pieces[i].group;
        const bf16* token[TOGETHER];
        for (int m = 0; m < g.n; m++)
          token[m] = (const bf16*)x + pair[g.start + m] / a.K * x_row;
        fit(paired, g.padded() * x_row);
        pair_tokens(token, g.n, x_row, paired.data());
      }
      int c1 = std::min(g.width, pieces[i].c0 + CHANNELS);
      activate_channels<T>(a, g, pair.data(), x, x_row, paired.data(), pieces[i].c0, c1, h);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < parts.all.size(); i++)
      parts.compute(parts.all[i], groups[parts.all[i].group], h);
#pragma omp for schedule(dynamic, 1)
    for (int j = 0; j < a.H; j += block) {
      int stop = std::min(a.H, j + block);
      for (int t = 0; t < a.T; t++) std::fill_n(a.out + int64_t(t) * a.H + j, stop - j, 0.f);
      if (a.columns_are_rows()) outputs_by_rows<T>(a, groups, pair.data(), h, j, stop);
      else outputs_by_channels<T>(a, groups, pair.data(), h, parts, j, stop);
      if (!a.x_bf16) continue;
      for (int64_t at = j; at < int64_t(a.T) * a.H; at += a.H)
        narrow(a.out + at, (bf16*)given.out + at, stop - j);
    }
  }
  scratch.free_large();
}

}  // namespace

// Null, or what is wrong
extern "C" const char* flexmoe_experts(const Stored* stored, const Call* call) try {
  Layer layer{*stored, *call};
  if (layer.weights_bf16) experts<bf16>(layer);
  else experts<float>(layer);
  return nullptr;
} catch (const std::out_of_range&) {
  return "a token's budget is not in the table of widths";
} catch (const std::bad_alloc&) {
  return "out of memory";
}
