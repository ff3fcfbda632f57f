// Ragged experts on the CPU: gate, up, activation and down of every routed pair, each expert cut
// to a width of its own. Weights are float32 or bfloat16 and channel-major, sums are float32.
//
// Two passes, both memory-bound when an expert has few tokens and arithmetic-bound when it has
// many. First the channels: a channel's gate and up are rows of length H, and so are the tokens, so
// four rows meet three tokens in twelve dot products held in registers. Then the outputs: every
// thread owns a block of columns of the result and adds up all experts there, so nothing is shared
// and the order of sums does not depend on the number of threads.
//
// Compiled once for each instruction set (AVX2+FMA, AVX512 with BF16); cpu.py picks at run time.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline float widen(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// --- Vectors of W floats ---------------------------------------------------------------------

#if defined(__AVX512F__)
using F = __m512;
constexpr int W = 16;
inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }
#else
using F = __m256;
constexpr int W = 8;
inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const bf16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline float sum(F v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

// --- How a row of weights meets a row of x: N values at a time -------------------------------

template <class T>
struct Row;

template <>
struct Row<float> {
  static constexpr int N = W;
  using X = float;
  using V = F;
  static V weights(const float* p) { return load(p); }
  static V tokens(const float* p) { return load(p); }
  static F dot(V a, V b, F c) { return fma(a, b, c); }
  static void arrange(const float* from, X* to) { std::memcpy(to, from, N * sizeof(float)); }
};

#if defined(__AVX512F__)
template <>
struct Row<bf16> {
  static constexpr int N = 2 * W;
  using X = bf16;
  using V = __m512bh;
  static V weights(const bf16* p) { return (V)_mm512_loadu_si512(p); }
  static V tokens(const bf16* p) { return (V)_mm512_loadu_si512(p); }
  static F dot(V a, V b, F c) { return _mm512_dpbf16_ps(c, a, b); }
  static void arrange(const float* from, X* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(load(from + W), load(from)));
  }
};
#else
// 2W bfloat16 are W integers: the upper halves are the odd values as they stand, the lower ones
// shifted the even values. x is put in the same order once: W even ones, then W odd ones.
template <>
struct Row<bf16> {
  static constexpr int N = 2 * W;
  using X = float;
  struct V {
    F even, odd;
  };
  static V weights(const bf16* p) {
    __m256i both = _mm256_loadu_si256((const __m256i*)p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)))};
  }
  static V tokens(const float* p) { return {load(p), load(p + W)}; }
  static F dot(V a, V b, F c) { return fma(a.odd, b.odd, fma(a.even, b.even, c)); }
  static void arrange(const float* from, X* to) {
    for (int i = 0; i < W; i++) to[i] = from[2 * i], to[W + i] = from[2 * i + 1];
  }
};
#endif

template <class T>
void arrange_row(const void* from, bool from_bf16, typename Row<T>::X* to, int H) {
  using R = Row<T>;
  float block[R::N];
  auto value = [&](int k) {
    return from_bf16 ? widen(((const bf16*)from)[k]) : ((const float*)from)[k];
  };
  int k = 0;
  for (; k + R::N <= H; k += R::N) {
    for (int i = 0; i < R::N; i++) block[i] = value(k + i);
    R::arrange(block, to + k);
  }
  if (k == H) return;
  std::fill(block, block + R::N, 0.f);
  for (int i = 0; k + i < H; i++) block[i] = value(k + i);
  R::arrange(block, to + k);  // a row of x has room for whole blocks
}

// --- Activations -----------------------------------------------------------------------------

// exp within 2 ulp between -87 and 88, and those ends beyond: a form compilers make vectors of
inline float exp_(float x) {
  x = std::min(std::max(x, -87.f), 88.f);
  float n = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2**23 rounds to an integer
  int32_t bits;
  std::memcpy(&bits, &n, 4);
  n -= 12582912.f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t scale = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &scale, 4);
  return p * power;
}

enum Activation { SILU, GELU, GELU_TANH, RELU2 };  // ACTIVATIONS in cpu.py

inline float activated(Activation kind, float v) {
  switch (kind) {
    case SILU: return v / (1.f + exp_(-v));
    case GELU: return 0.5f * v * (1.f + std::erf(v * 0.70710678f));
    case GELU_TANH: return v / (1.f + exp_(-1.59576912f * (v + 0.044715f * v * v * v)));
    case RELU2: return v > 0.f ? v * v : 0.f;
  }
  return v;
}

template <Activation kind>
void activate(const float* gate, const float* up, float* h, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) h[i] = activated(kind, gate[i]) * (up ? up[i] : 1.f);
}

void activate(int kind, const float* gate, const float* up, float* h, int n) {
  switch (kind) {
    case SILU: return activate<SILU>(gate, up, h, n);
    case GELU: return activate<GELU>(gate, up, h, n);
    case GELU_TANH: return activate<GELU_TANH>(gate, up, h, n);
    case RELU2: return activate<RELU2>(gate, up, h, n);
  }
}

// --- Register blocks -------------------------------------------------------------------------

// part[r][m] += row r . token m, from k0 to k1, for R rows and M tokens
template <class T, int R, int M>
void dots(const T* rows, int64_t stride, const typename Row<T>::X* const* x, int k0, int k1,
          float* part, int ld) {
  F acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  for (int k = k0; k < k1; k += Row<T>::N) {
    typename Row<T>::V token[M];
    for (int m = 0; m < M; m++) token[m] = Row<T>::tokens(x[m] + k);
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
constexpr int COLUMNS = 256;   // of a piece of work in the second pass
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
#define DOTS(R, M) dots<T, R, M>(row, stride, token + m, k0, k1, to, n), m += M
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
  const int cols = j1 - j0, ld = (COLUMNS + 2 * W - 1) / (2 * W) * (2 * W);
  std::vector<float> y(TOKENS * ld), packed(PACKED * ld);
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
