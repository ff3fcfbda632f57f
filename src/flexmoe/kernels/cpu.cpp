// Ragged experts on the CPU: gate, up, activation and down of every routed pair, each expert cut
// to a width of its own. Weights are float32 or bfloat16 and channel-major, sums are float32.
//
// Two passes, both memory-bound when an expert has few tokens and arithmetic-bound when it has
// many. First the channels: a channel's gate and up are rows of length H, and so are the tokens, so
// four rows meet three tokens in twelve dot products held in registers. Then the outputs: every
// thread owns a block of columns of the result and adds up all experts there, so nothing is shared
// and the order of sums does not depend on the number of threads.
//
// cpu.py compiles it for the instruction set at hand: AVX2 with FMA, or AVX512 with BF16.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu_vectors.h"

namespace {

// --- Register blocks -------------------------------------------------------------------------

// Asking for the rows to come while these are computed. Measured with few tokens: bfloat16 gains a
// tenth to a fifth, float32 nothing.
template <class T>
void ahead(const T* row) {
  if constexpr (sizeof(T) == 2) __builtin_prefetch(row, 0, 2);
}

// part[r][m] += row r . token m, from k0 to k1, for R rows and M tokens. LAST: of these rows
template <class T, int R, int M, bool LAST = false>
void dots(const T* rows, int64_t stride, const typename Row<T>::X* const* x, int k0, int k1,
          float* part, int ld) {
  F acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  for (int k = k0; k < k1; k += Row<T>::N) {
    typename Row<T>::V token[M];
    for (int m = 0; m < M; m++) token[m] = Row<T>::tokens(x[m] + k);
    if (LAST)
      for (int r = 0; r < R; r++) ahead(rows + (R + r) * stride + k);
    for (int r = 0; r < R; r++) {
      auto weight = Row<T>::weights(rows + r * stride + k);
      for (int m = 0; m < M; m++) acc[r][m] = Row<T>::dot(weight, token[m], acc[r][m]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) part[r * ld + m] += sum(acc[r][m]);
}

// y[m][j] += sum over 4 channels of h * down, for M tokens and n columns
template <class T, int M>
void outer(const T* down, int64_t stride, const float* h, int ldh, float* y, int ldy, int n) {
  F weight[4][M];
  for (int c = 0; c < 4; c++)
    for (int m = 0; m < M; m++) weight[c][m] = set1(h[c * ldh + m]);
  int j = 0;
  for (; j + W <= n; j += W) {
    F row[4];
    for (int c = 0; c < 4; c++) ahead(down + (4 + c) * stride + j);
    for (int c = 0; c < 4; c++) row[c] = load(down + c * stride + j);
    for (int m = 0; m < M; m++) {
      F v = load(y + m * ldy + j);
      for (int c = 0; c < 4; c++) v = fma(weight[c][m], row[c], v);
      store(y + m * ldy + j, v);
    }
  }
  for (; j < n; j++)
    for (int m = 0; m < M; m++)
      for (int c = 0; c < 4; c++) y[m * ldy + j] += h[c * ldh + m] * widen(down[c * stride + j]);
}

// y[m][0:2W] += sum over n channels of h * panel, for M tokens
template <int M>
void tile(const float* panel, const float* h, int ldh, int n, float* y, int ldy) {
  F acc[M][2];
  for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = zero();
  for (int c = 0; c < n; c++) {
    F left = load(panel + c * 2 * W), right = load(panel + c * 2 * W + W);
    for (int m = 0; m < M; m++) {
      F weight = set1(h[c * ldh + m]);
      acc[m][0] = fma(weight, left, acc[m][0]);
      acc[m][1] = fma(weight, right, acc[m][1]);
    }
  }
  for (int m = 0; m < M; m++) {
    store(y + m * ldy, add(load(y + m * ldy), acc[m][0]));
    store(y + m * ldy + W, add(load(y + m * ldy + W), acc[m][1]));
  }
}

// --- The layer -------------------------------------------------------------------------------

constexpr int CHANNELS = 32;   // of a piece of work in the first pass
constexpr int TOKENS = 60;     // of one, in both passes: their rows of x stay in the L2 cache
constexpr int DEPTH = 1024;    // values of a row before the next tokens: rows stay in the L1 cache
constexpr int COLUMNS = 2048;  // of one in the second pass: rows are read as they lie in memory
constexpr int PACKED = 128;    // channels packed at a time
constexpr int FEW = 8;         // tokens for which packing does not pay

struct Group {  // the pairs of one expert at one budget, at most TOKENS of them
  int expert, width, start, n;
  int64_t h;  // where its activations [width, n] begin
};

struct Layer {  // `_Layer` in cpu.py; shapes in interface.py; all tensors are contiguous
  const void *up, *down, *up_bias, *down_bias, *x;
  const int64_t* index;
  const float* weight;
  const int32_t *offset, *width, *token_budget;
  float* out;
  int32_t T, K, E, B, H, sides, activation, budget, weights_bf16, x_bf16, threads;
};

// Pairs sorted by (expert, budget): position of each pair, and the groups
void sort_pairs(const Layer& a, std::vector<int32_t>& pair, std::vector<Group>& groups) {
  int keys = a.E * a.B;
  auto key = [&](int s) {
    int64_t e = a.index[s];
    if (e < 0 || e >= a.E) return -1;
    int b = a.token_budget ? a.token_budget[s / a.K] : a.budget;
    if (b < 0 || b >= a.B) throw std::out_of_range("budget");
    return int(e) * a.B + b;
  };
  std::vector<int32_t> start(keys + 1, 0);
  int S = a.T * a.K;
  for (int s = 0; s < S; s++)
    if (int k = key(s); k >= 0) start[k + 1]++;
  for (int k = 0; k < keys; k++) start[k + 1] += start[k];
  pair.resize(start[keys]);
  std::vector<int32_t> at(start.begin(), start.end() - 1);
  for (int s = 0; s < S; s++)
    if (int k = key(s); k >= 0) pair[at[k]++] = s;
  int64_t h = 0;
  for (int k = 0; k < keys; k++)
    for (int i = start[k]; i < start[k + 1]; i += TOKENS) {
      int e = k / a.B, stored = a.offset[e + 1] - a.offset[e];
      int w = std::clamp(a.width[(k % a.B) * a.E + e], 0, stored);
      int n = std::min(TOKENS, start[k + 1] - i);
      groups.push_back({e, w, i, n, h});
      h += int64_t(w) * n;
    }
}

// First pass: activations of channels c0 to c1 for the tokens of a group
template <class T>
void channels(const Layer& a, const Group& g, const int32_t* pair, const typename Row<T>::X* x,
              int64_t x_row, int c0, int c1, float* h) {
  using X = typename Row<T>::X;
  constexpr int N = Row<T>::N;
  const int n = g.n, sides = a.sides, whole = a.H / N * N;
  const int64_t stride = int64_t(sides) * a.H;
  const X* token[TOKENS];
  float part[2 * CHANNELS * TOKENS];
  for (int m = 0; m < n; m++) token[m] = x + pair[g.start + m] / a.K * x_row;
  for (int side = 0; side < sides; side++) {
    const int64_t first = a.offset[g.expert] + c0;
    const T* rows = (const T*)a.up + (first * sides + side) * a.H;
    float* sums = part + side * (c1 - c0) * n;
    for (int c = 0; c < c1 - c0; c++) {
      float bias = 0.f;
      if (a.up_bias) bias = widen(((const T*)a.up_bias)[(first + c) * sides + side]);
      std::fill(sums + c * n, sums + (c + 1) * n, bias);
    }
    for (int c = 0; c < c1 - c0;) {
      int r = c1 - c0 - c >= 4 ? 4 : 1;
      const T* row = rows + c * stride;
      for (int k0 = 0; k0 < whole; k0 += DEPTH) {
        int k1 = std::min(whole, k0 + DEPTH);
        for (int m = 0; m < n;) {
          int left = n - m;
          float* to = sums + c * n + m;
#define DOTS(R, M)                                                           \
  (left == M ? dots<T, R, M, true>(row, stride, token + m, k0, k1, to, n)   \
             : dots<T, R, M>(row, stride, token + m, k0, k1, to, n)), m += M
          if (r == 4) {
            if (left >= 3 && left != 4) DOTS(4, 3);
            else if (left >= 2) DOTS(4, 2);
            else DOTS(4, 1);
          } else {
            if (left >= 3) DOTS(1, 3);
            else DOTS(1, 1);
          }
#undef DOTS
        }
      }
      if (whole < a.H) {  // the end of a row: x is padded with zeros there, weights are not
        alignas(64) T end[4 * N] = {};
        for (int i = 0; i < r; i++)
          std::memcpy(end + i * N, row + i * stride + whole, (a.H - whole) * sizeof(T));
        for (int m = 0; m < n; m++) {
          const X* last = token[m] + whole;
          for (int i = 0; i < r; i++)
            dots<T, 1, 1>(end + i * N, N, &last, 0, N, sums + (c + i) * n + m, n);
        }
      }
      c += r;
    }
  }
  const float* up = sides == 2 ? part + (c1 - c0) * n : nullptr;
  activate(a.activation, part, up, h + g.h + int64_t(c0) * n, (c1 - c0) * n);
}

// Second pass: columns j0 to j1 of all outputs
template <class T>
void columns(const Layer& a, const std::vector<Group>& groups, const int32_t* pair, const float* h,
             int j0, int j1) {
  const int cols = j1 - j0, ld = (cols + 2 * W - 1) / (2 * W) * (2 * W);
  int most = 0;  // no larger than needed: memory asked for anew costs a short call a tenth
  for (const Group& g : groups) most = std::max(most, g.n);
  std::vector<float> y(most * ld), packed(most > FEW ? PACKED * ld : 0);
  for (int t = 0; t < a.T; t++) std::fill_n(a.out + int64_t(t) * a.H + j0, cols, 0.f);
  for (const Group& g : groups) {
    const T* down = (const T*)a.down + int64_t(a.offset[g.expert]) * a.H + j0;
    const int n = g.n;
    std::fill_n(y.begin(), n * ld, 0.f);
    if (a.down_bias)
      for (int m = 0; m < n; m++)
        for (int j = 0; j < cols; j++)
          y[m * ld + j] = widen(((const T*)a.down_bias)[int64_t(g.expert) * a.H + j0 + j]);
    if (n <= FEW) {
      int c = 0;
      for (; c + 4 <= g.width; c += 4) {
        const T* row = down + int64_t(c) * a.H;
        const float* act = h + g.h + int64_t(c) * n;
        int m = 0;
        for (; m + 2 <= n; m += 2) outer<T, 2>(row, a.H, act + m, n, &y[m * ld], ld, cols);
        if (m < n) outer<T, 1>(row, a.H, act + m, n, &y[m * ld], ld, cols);
      }
      for (; c < g.width; c++)
        for (int m = 0; m < n; m++) {
          float weight = h[g.h + int64_t(c) * n + m];
          for (int j = 0; j < cols; j++) y[m * ld + j] += weight * widen(down[int64_t(c) * a.H + j]);
        }
    } else {
      for (int c0 = 0; c0 < g.width; c0 += PACKED) {
        const int count = std::min(PACKED, g.width - c0);
        for (int c = 0; c < count; c++) {
          const T* row = down + int64_t(c0 + c) * a.H;
          for (int j = 0; j < cols; j += W) {
            float* to = &packed[(j / (2 * W) * PACKED + c) * 2 * W + j % (2 * W)];
            if (j + W <= cols) store(to, load(row + j));
            else
              for (int i = 0; i < W; i++) to[i] = j + i < cols ? widen(row[j + i]) : 0.f;
          }
        }
        for (int j = 0; j < cols; j += 2 * W) {
          const float* panel = &packed[j / (2 * W) * PACKED * 2 * W];
          const float* act = h + g.h + int64_t(c0) * n;
          int m = 0;
          for (; m + 6 <= n; m += 6) tile<6>(panel, act + m, n, count, &y[m * ld + j], ld);
          for (; m + 2 <= n; m += 2) tile<2>(panel, act + m, n, count, &y[m * ld + j], ld);
          if (m < n) tile<1>(panel, act + m, n, count, &y[m * ld + j], ld);
        }
      }
    }
    for (int m = 0; m < n; m++) {
      int s = pair[g.start + m];
      float* to = a.out + int64_t(s / a.K) * a.H + j0;
      for (int j = 0; j < cols; j++) to[j] += a.weight[s] * y[m * ld + j];
    }
  }
}

template <class T>
void experts(const Layer& a) {
  using X = typename Row<T>::X;
  constexpr int N = Row<T>::N;
  std::vector<int32_t> pair;
  std::vector<Group> groups;
  sort_pairs(a, pair, groups);
  struct Piece {
    int group, c0;
  };
  std::vector<Piece> pieces;
  int64_t size = 0;
  for (size_t g = 0; g < groups.size(); g++) {
    for (int c = 0; c < groups[g].width; c += CHANNELS) pieces.push_back({int(g), c});
    size = groups[g].h + int64_t(groups[g].width) * groups[g].n;
  }
  const int64_t x_row = (a.H + N - 1) / N * N;
  std::vector<X> x(a.T * x_row);
  std::vector<float> h(size);
  const int per_thread = ((a.H + a.threads - 1) / a.threads + 2 * W - 1) / (2 * W) * (2 * W);
  const int block = std::min(COLUMNS, per_thread);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for
    for (int t = 0; t < a.T; t++) {
      int64_t bytes = int64_t(t) * a.H * (a.x_bf16 ? 2 : 4);
      arrange_row<T>((const char*)a.x + bytes, a.x_bf16, &x[t * x_row], a.H);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < pieces.size(); i++) {
      const Group& g = groups[pieces[i].group];
      int c1 = std::min(g.width, pieces[i].c0 + CHANNELS);
      channels<T>(a, g, pair.data(), x.data(), x_row, pieces[i].c0, c1, h.data());
    }
#pragma omp for schedule(dynamic, 1)
    for (int j = 0; j < a.H; j += block)
      columns<T>(a, groups, pair.data(), h.data(), j, std::min(a.H, j + block));
  }
}

}  // namespace

// Null, or what is wrong
extern "C" const char* flexmoe_experts(const Layer* layer) try {
  if (layer->weights_bf16) experts<bf16>(*layer);
  else experts<float>(*layer);
  return nullptr;
} catch (const std::out_of_range&) {
  return "a token's budget is not in the table of widths";
} catch (const std::bad_alloc&) {
  return "out of memory";
}
