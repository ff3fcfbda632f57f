// Vectors of floats for the instruction set at hand, rows of weights and tokens, activations.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

namespace {

// Memory that begins with a cache line, so that a vector or a row of a tile never lies in two, and
// that nothing is written to before it is used
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  template <class U>
  void construct(U*) {}
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, Aligned<T>>;

template <class I>
constexpr I up_to(I n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls `run` with n, which is LEAST to MOST, as a constant
template <int LEAST, int MOST, class Run>
void constant(int n, Run run) {
  if constexpr (LEAST < MOST)
    if (n > LEAST) return constant<LEAST + 1, MOST>(n, run);
  run(Constant<LEAST>());
}

// Calls `run` for n tokens, at most MOST at a time and the last two times about as many each: with
// how many, a constant, and the first
template <int MOST, class Run>
void some_at_a_time(int n, Run run) {
  for (int m = 0, some; m < n; m += some) {
    const int left = n - m;
    some = std::min(MOST, left > MOST ? (left + 1) / 2 : left);
    constant<1, MOST>(some, [&](auto M) { run(M, m); });
  }
}

// Room for n values, of which nothing is kept
template <class T>
void fit(Buffer<T>& buffer, size_t n) {
  buffer.clear();
  buffer.resize(n);
}

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

// To the nearest bfloat16, to even at a tie
inline void narrow(const float* from, bf16* to, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i].bits = from[i] == from[i] ? rounded : 0x7fc0;
  }
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
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline float sum(F v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

// --- How a row of weights meets a row of x: N values at a time, in PARTS of a vector each -------

template <class T>
struct Row;

template <>
struct Row<float> {
  static constexpr int N = W, PARTS = 1;
  using X = float;
  using V = F;
  static V weights(const float* p, int) { return load(p); }
  static V tokens(const float* p, int) { return load(p); }
  static F dot(V a, V b, F c) { return fma(a, b, c); }
  static void arrange(const float* from, X* to) { std::memcpy(to, from, N * sizeof(float)); }
};

#if defined(__AVX512F__)
template <>
struct Row<bf16> {
  static constexpr int N = 2 * W, PARTS = 1;
  using X = bf16;
  using V = __m512bh;
  static V weights(const bf16* p, int) { return (V)_mm512_loadu_si512(p); }
  static V tokens(const bf16* p, int) { return (V)_mm512_loadu_si512(p); }
  static F dot(V a, V b, F c) { return _mm512_dpbf16_ps(c, a, b); }
  static void arrange(const float* from, X* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(load(from + W), load(from)));
  }
};
#else
// 2W bfloat16 are W integers: shifted they are the even values, and without their lower halves the
// odd ones. x is put in the same order once: W even ones, then W odd ones. Rows are loaded for each
// part: there are registers for one at a time.
template <>
struct Row<bf16> {
  static constexpr int N = 2 * W, PARTS = 2;
  using X = float;
  using V = F;
  static V weights(const bf16* p, int odd) {
    __m256i both = _mm256_loadu_si256((const __m256i*)p);
    __m256i upper = _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000));
    return _mm256_castsi256_ps(odd ? upper : _mm256_slli_epi32(both, 16));
  }
  static V tokens(const float* p, int odd) { return load(p + odd * W); }
  static F dot(V a, V b, F c) { return fma(a, b, c); }
  static void arrange(const float* from, X* to) {
    for (int i = 0; i < W; i++) to[i] = from[2 * i], to[W + i] = from[2 * i + 1];
  }
};
#endif

// W of 2W values of a row: the first or the last, or where there are two parts the even or the odd
template <class T>
F half(const T* p, int which) {
  if constexpr (Row<T>::PARTS == 2) return Row<T>::weights(p, which);
  else return load(p + which * W);
}

// 2W values that were computed with `half`, to the order of the row
template <class T>
void in_order([[maybe_unused]] float* v) {
#if !defined(__AVX512F__)
  if (Row<T>::PARTS == 1) return;
  F low = _mm256_unpacklo_ps(load(v), load(v + W)), high = _mm256_unpackhi_ps(load(v), load(v + W));
  store(v, _mm256_permute2f128_ps(low, high, 0x20));
  store(v + W, _mm256_permute2f128_ps(low, high, 0x31));
#endif
}

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

// exp within 2 ulp between -87 and 87, and those ends beyond: a form compilers make vectors of
inline float exp_(float x) {
  x = std::min(std::max(x, -87.f), 87.f);
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
  uint32_t scale = uint32_t(bits + 127) << 23;
  float power;
  std::memcpy(&power, &scale, 4);
  return p * power;
}

// 1 / x within 4e-7 for 1 <= x <= 1e38: a guess from its bits and three of Newton's steps. Vectors
// take less time for that than for a division
inline float reciprocal(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = 0x7ef311c7 - bits;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 2.f - x * y;
  y *= 2.f - x * y;
  return y * (2.f - x * y);
}

enum Activation { SILU, GELU, GELU_TANH, RELU2 };  // activations.py

inline float activated(Activation kind, float v) {
  switch (kind) {
    case SILU: return v * reciprocal(1.f + exp_(-v));
    case GELU: return 0.5f * v * (1.f + std::erf(v * 0.70710678f));
    case GELU_TANH:
      return v * reciprocal(1.f + exp_(-1.59576912f * (v + 0.044715f * v * v * v)));
    case RELU2: return v < 0.f ? 0.f : v * v;  // NaN stays
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

}  // namespace
