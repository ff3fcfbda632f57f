// What the kernels use of AVX-512, and of AMX with -DAMX, in plain C++ for a processor with AVX2: the
// sources for those run where the instructions are not. Sums of products are rounded as they say.

#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1

namespace emulated {

template <class T>
struct Lanes {
  T lane[64 / sizeof(T)];
  T operator[](int i) const { return lane[i]; }
};

template <class To, class From>
To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, class V>
Lanes<T> lanes(V v) {
  return as<Lanes<T>>(v);
}

template <class V, class T = float, class Of>
V each(Of of) {
  Lanes<T> made;
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); i++) made.lane[i] = of(i);
  V v;
  std::memcpy(&v, &made, sizeof v);
  return v;
}

inline float wide(uint16_t half) { return as<float>(uint32_t(half) << 16); }
inline uint16_t narrow(float v) {
  const uint32_t bits = as<uint32_t>(v);
  return v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}

template <class V>
V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
template <class T>
T* aligned(T* p) {
  if (uintptr_t(p) % 64) __builtin_trap();
  return p;
}

inline __m512 set1(float v) { return each<__m512>([&](int) { return v; }); }
inline __m512i set1(uint32_t v) { return each<__m512i, uint32_t>([&](int) { return v; }); }
inline __m512 add(__m512 a, __m512 b) { return a + b; }
inline __m512 fma(__m512 a, __m512 b, __m512 c) {
  auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return each<__m512>([&](int i) { return __builtin_fmaf(x[i], y[i], z[i]); });
}
inline float sum(__m512 v) {
  auto x = lanes<float>(v);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) x.lane[i] += x[i + n];
  return x[0];
}
inline __m512i widen(__m256i v) {
  auto x = as<Lanes<uint16_t>>(each<__m512i, uint16_t>([](int) { return 0; }));
  std::memcpy(&x, &v, sizeof v);
  return each<__m512i, uint32_t>([&](int i) { return x[i]; });
}
inline __m512i left(__m512i v, int by) {
  auto x = lanes<uint32_t>(v);
  return each<__m512i, uint32_t>([&](int i) { return x[i] << by; });
}
inline __m512i right(__m512i v, int by) {
  auto x = lanes<uint32_t>(v);
  return each<__m512i, uint32_t>([&](int i) { return x[i] >> by; });
}
inline __m512i both(__m512i a, __m512i b) { return a & b; }
inline __m512i either(__m512i a, __m512i b) { return a | b; }

// Pairs of bfloat16: the odd ones first, one rounding after each product
inline __m512 dot(__m512 sums, __m512bh a, __m512bh b) {
  auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  auto z = lanes<float>(sums);
  return each<__m512>([&](int i) {
    const float odd = __builtin_fmaf(wide(x[2 * i + 1]), wide(y[2 * i + 1]), z[i]);
    return __builtin_fmaf(wide(x[2 * i]), wide(y[2 * i]), odd);
  });
}
inline __m512bh narrow(__m512 high, __m512 low) {
  auto x = lanes<float>(low), y = lanes<float>(high);
  return each<__m512bh, uint16_t>([&](int i) { return narrow(i < 16 ? x[i] : y[i - 16]); });
}
inline __m256i narrow(__m512 v) {
  auto x = lanes<float>(v);
  return each<__m256i, uint16_t>([&](int i) { return narrow(x[i]); });
}

// Of each quarter of 128 bits the lower half (HIGH = 0) or the upper, values of a and b in turns
template <class T, int HIGH>
__m512i unpack(__m512i a, __m512i b) {
  constexpr int N = 16 / sizeof(T);
  auto x = lanes<T>(a), y = lanes<T>(b);
  return each<__m512i, T>([&](int i) {
    const int from = i / N * N + HIGH * N / 2 + i % N / 2;
    return i % 2 ? y[from] : x[from];
  });
}
inline __m512i quarters(__m512i a, __m512i b, int which) {
  auto x = lanes<uint64_t>(a), y = lanes<uint64_t>(b);
  return each<__m512i, uint64_t>([&](int i) {
    const int from = (which >> i / 2 * 2 & 3) * 2 + i % 2;
    return i < 4 ? x[from] : y[from];
  });
}
inline __m512 choose(__m512 a, __m512i which, __m512 b) {
  auto x = lanes<float>(a), y = lanes<float>(b);
  auto from = lanes<uint32_t>(which);
  return each<__m512>([&](int i) { return from[i] & 16 ? y[from[i] & 15] : x[from[i] & 15]; });
}

// Only what the mask says is read or written
template <class V, class T>
V load_some(uint32_t mask, const T* from) {
  return each<V, T>([&](int i) { return mask >> i & 1 ? from[i] : T(0); });
}
inline void store_some(float* to, uint32_t mask, __m512 v) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) to[i] = lanes<float>(v)[i];
}

}  // namespace emulated

#define _mm512_setzero_ps() emulated::set1(0.f)
#define _mm512_set1_ps(v) emulated::set1(float(v))
#define _mm512_setzero_si512() emulated::set1(0u)
#define _mm512_set1_epi32(v) emulated::set1(uint32_t(v))
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_load_si512(p) emulated::load<__m512i>(emulated::aligned(p))
#define _mm512_storeu_ps emulated::store
#define _mm512_storeu_si512 emulated::store
#define _mm512_store_si512(p, v) emulated::store(emulated::aligned(p), v)
#define _mm512_add_ps emulated::add
#define _mm512_fmadd_ps emulated::fma
#define _mm512_reduce_add_ps emulated::sum
#define _mm512_castsi512_ps emulated::as<__m512, __m512i>
#define _mm512_cvtepu16_epi32 emulated::widen
#define _mm512_slli_epi32 emulated::left
#define _mm512_srli_epi32 emulated::right
#define _mm512_and_si512 emulated::both
#define _mm512_or_si512 emulated::either
#define _mm512_dpbf16_ps emulated::dot
#define _mm512_cvtne2ps_pbh emulated::narrow
#define _mm512_cvtneps_pbh emulated::narrow
#define _mm512_unpacklo_epi16 emulated::unpack<uint16_t, 0>
#define _mm512_unpackhi_epi16 emulated::unpack<uint16_t, 1>
#define _mm512_unpacklo_epi32 emulated::unpack<uint32_t, 0>
#define _mm512_unpackhi_epi32 emulated::unpack<uint32_t, 1>
#define _mm512_unpacklo_epi64 emulated::unpack<uint64_t, 0>
#define _mm512_unpackhi_epi64 emulated::unpack<uint64_t, 1>
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::quarters
#define _mm512_permutex2var_ps emulated::choose
#define _mm512_maskz_loadu_ps emulated::load_some<__m512, float>
#define _mm512_mask_storeu_ps emulated::store_some
#define _mm512_maskz_loadu_epi16(mask, p) \
  (emulated::load_some<__m512i, uint16_t>(mask, (const uint16_t*)(p)))
#define _mm256_maskz_loadu_epi16(mask, p) \
  (emulated::load_some<__m256i, uint16_t>(mask, (const uint16_t*)(p)))

#if defined(AMX)
#define __AMX_BF16__ 1
#define CPU_AMX_H  // below is what that header has

namespace {

thread_local uint8_t tile[8][1024];
thread_local bool configured = false;

inline void configure_tiles(const uint8_t (&config)[64]) {
  for (int i = 0; i < 8; i++)
    if (config[0] != 1 || config[16 + 2 * i] != 64 || config[48 + i] != 16) __builtin_trap();
  configured = true;
}
inline void release_tiles() { configured = false; }

template <int I>
void zero_tile() {
  if (!configured) __builtin_trap();
  std::memset(tile[I], 0, 1024);
}
template <int I>
void load_tile(const void* from, int64_t bytes) {
  if (!configured) __builtin_trap();
  for (int r = 0; r < 16; r++) std::memcpy(tile[I] + r * 64, (const uint8_t*)from + r * bytes, 64);
}
template <int I>
void store_tile(void* to, int64_t bytes) {
  for (int r = 0; r < 16; r++) std::memcpy((uint8_t*)to + r * bytes, tile[I] + r * 64, 64);
}
template <int TO, int A, int B>
void multiply_tiles() {
  uint16_t a[16][32], b[16][32];
  float sum[16][16];
  std::memcpy(a, tile[A], 1024), std::memcpy(b, tile[B], 1024), std::memcpy(sum, tile[TO], 1024);
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 32; k++)
      for (int n = 0; n < 16; n++)
        sum[m][n] += emulated::wide(a[m][k]) * emulated::wide(b[k / 2][2 * n + k % 2]);
  std::memcpy(tile[TO], sum, 1024);
}

}  // namespace
#endif
