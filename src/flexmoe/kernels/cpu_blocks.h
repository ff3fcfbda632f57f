// Register blocks: rows of weights meet tokens.

#pragma once

#include "cpu_vectors.h"

namespace {

// Asking for the rows to come while these are computed. Measured: bfloat16 gains a tenth to a fifth
// with few tokens, float32 nothing on an AMD EPYC and 7 % at 8 tokens an expert on an Intel Xeon.
template <class T>
void ahead(const T* row) {
  __builtin_prefetch(row, 0, 2);
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

constexpr int DEPTH = 1024;  // values of a row before the next tokens: rows stay in the L1 cache

// out[r][m] += row r . token m, for `count` rows of K values and n tokens, which are padded with
// zeros to whole vectors. Neither the other tokens nor the other rows change a bit of a result.
template <class T>
void products(const T* rows, int64_t stride, int count, const typename Row<T>::X* const* token,
              int n, int K, float* out) {
  using X = typename Row<T>::X;
  constexpr int N = Row<T>::N;
  const int whole = K / N * N;
  for (int c = 0; c < count;) {
    int r = W == 16 && n == 1 && count - c >= 8 ? 8 : count - c >= 4 ? 4 : 1;
    const T* row = rows + c * stride;
    for (int k0 = 0; k0 < whole; k0 += DEPTH) {
      int k1 = std::min(whole, k0 + DEPTH);
      for (int m = 0; m < n;) {
        int left = n - m;
        float* to = out + c * n + m;
#define DOTS(R, M)                                                          \
  (left == M ? dots<T, R, M, true>(row, stride, token + m, k0, k1, to, n)   \
             : dots<T, R, M>(row, stride, token + m, k0, k1, to, n)), m += M
        if (r == 8) DOTS(8, 1);
        else if (r == 4) {
          if (W == 16 && left >= 6) DOTS(4, 6);  // AVX512 has registers for it
          else if (left >= 3 && left != 4) DOTS(4, 3);
          else if (left >= 2) DOTS(4, 2);
          else DOTS(4, 1);
        } else {
          if (left >= 3) DOTS(1, 3);
          else DOTS(1, 1);
        }
#undef DOTS
      }
    }
    if (whole < K) {  // the end of a row
      alignas(64) T end[8 * N] = {};
      for (int i = 0; i < r; i++)
        std::memcpy(end + i * N, row + i * stride + whole, (K - whole) * sizeof(T));
      for (int m = 0; m < n; m++) {
        const X* last = token[m] + whole;
        for (int i = 0; i < r; i++)
          dots<T, 1, 1>(end + i * N, N, &last, 0, N, out + (c + i) * n + m, n);
      }
    }
    c += r;
  }
}

}  // namespace
