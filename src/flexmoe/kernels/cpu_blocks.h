// Register blocks: rows of weights meet tokens.

#pragma once

#include "cpu_vectors.h"

namespace {

// Rows without gaps between them are read in four or eight places at once, far apart and in each one
// after the other: processors fetch such streams ahead well if they are as long as a page. On an AMD
// EPYC neighbours took up to 1.4 times as long, and 16 places twice as long as 8. On an Intel Xeon it
// helps to ask for them where an expert has some tokens (0.92 of the time), not for one or two (1.03
// to 1.07); on the EPYC it gains nothing.
constexpr int64_t PAGE = 4096;
constexpr int ASKED_FOR_FROM = W == 16 ? 3 : 1 << 30;  // tokens

template <class T>
void ahead(const T* row) {
  __builtin_prefetch(row, 0, 2);
}

// part[r][m] += row r . token m, from k0 to k1, for R rows and M tokens. ASK: for `asked` rows from
// `next` on
template <class T, int R, int M, bool ASK = false>
void dots(const T* rows, int64_t stride, const typename Row<T>::X* const* x, int k0, int k1,
          float* part, int ld, const T* next = nullptr, int asked = 0) {
  F acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  for (int k = k0; k < k1; k += Row<T>::N) {
    for (int r = 0; ASK && r < asked; r++) ahead(next + r * stride + k);
    for (int i = 0; i < Row<T>::PARTS; i++) {
      typename Row<T>::V token[M];
      for (int m = 0; m < M; m++) token[m] = Row<T>::tokens(x[m] + k, i);
      for (int r = 0; r < R; r++) {
        auto weight = Row<T>::weights(rows + r * stride + k, i);
        for (int m = 0; m < M; m++) acc[r][m] = Row<T>::dot(weight, token[m], acc[r][m]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) part[r * ld + m] += sum(acc[r][m]);
}

// out[r][m] += row r . token m, for R rows and n tokens, at most MOST at a time; `more` rows are asked
// for, from `next` on
template <class T, int R, int MOST>
void some_rows(const T* rows, int64_t stride, const T* next, int more,
               const typename Row<T>::X* const* token, int n, int K, float* out, int ld) {
  using X = typename Row<T>::X;
  constexpr int N = Row<T>::N;
  constexpr int DEPTH = 4096 / sizeof(T);  // of a row before the next tokens: it stays in L1
  const int whole = K / N * N, times = (n + MOST - 1) / MOST;
  const int share = (more + times - 1) / times;  // asked for by some tokens: by all, a share each
  for (int k0 = 0; k0 < whole; k0 += DEPTH) {
    const int k1 = std::min(whole, k0 + DEPTH);
    int done = 0;
    some_at_a_time<MOST>(n, [&](auto M, int m) {
      const int asked = std::min(share, more - done);
      (asked ? dots<T, R, M, true> : dots<T, R, M>)(
          rows, stride, token + m, k0, k1, out + m, ld, next + done * stride, asked);
      done += asked;
    });
  }
  if (whole == K) return;
  alignas(64) T end[R * N] = {};  // of the rows
  for (int r = 0; r < R; r++)
    std::memcpy(end + r * N, rows + r * stride + whole, (K - whole) * sizeof(T));
  for (int m = 0; m < n; m++) {
    const X* last = token[m] + whole;
    dots<T, R, 1>(end, N, &last, 0, N, out + m, ld);
  }
}

// out[s][r][m] += row r of side s . token m, for `count` rows of K values on each of some sides, and
// n tokens, which are padded with zeros to whole vectors; `after` more rows follow. Sides are `side`
// apart, in out `out_side`. Neither the other tokens nor the other rows change a bit of a result.
template <class T>
void products(const T* rows, int64_t stride, int64_t side, int sides, int count, int after,
              const typename Row<T>::X* const* token, int n, int K, float* out, int out_side) {
  constexpr int MOST = W == 16 ? 6 : 3;  // AVX512 has registers for more
  const int64_t bytes = count / 4 * stride * sizeof(T);
  const bool streams = stride == sides * K && bytes >= PAGE;
  int c = 0;
  auto by = [&](auto R, auto M) {  // R rows at a time, as far as there are so many
    const int times = (count - c) / R, apart = streams ? times : 1, step = streams ? 1 : R;
    for (int i = 0; i < times; i++, c += step)
      for (int s = 0; s < sides; s++) {
        const bool last = s + 1 == sides;
        const T* own = rows + c * stride + s * side;
        const T* next = last ? own - s * side + step * stride : own + side;
        int more = std::min<int>(R, count + after - c - R);
        if (streams) more = n < ASKED_FOR_FROM || (last && i + 1 == times) ? 0 : R;
        some_rows<T, R, M>(own, apart * stride, next, more, token, n, K,
                           out + s * out_side + c * n, apart * n);
      }
    c += times * (R - step);
  };
  if constexpr (W == 16)
    if (n == 1) by(Constant<8>(), Constant<1>());
  by(Constant<4>(), Constant<MOST>());
  by(Constant<1>(), Constant<3>());
}

// y[m][j] += sum over C channels of h * down, for M tokens and n columns. ASK: for those that are
// `next` after them
template <class T, int C, int M, bool ASK>
void outer(const T* down, int64_t stride, int64_t next, const float* h, int ldh, float* y, int ldy,
           int n) {
  constexpr int PARTS = Row<T>::PARTS;
  F weight[C][M];
  for (int c = 0; c < C; c++)
    for (int m = 0; m < M; m++) weight[c][m] = set1(h[c * ldh + m]);
  for (int j = 0; j < n; j += PARTS * W) {
    for (int c = 0; ASK && c < C; c++) ahead(down + c * stride + next + j);
    for (int i = 0; i < PARTS; i++) {
      float* to = y + j + i * W;
      F v[M];
      for (int m = 0; m < M; m++) v[m] = load(to + m * ldy);
      for (int c = 0; c < C; c++) {
        F row = half(down + c * stride + j, i);
        for (int m = 0; m < M; m++) v[m] = fma(weight[c][m], row, v[m]);
      }
      for (int m = 0; m < M; m++) store(to + m * ldy, v[m]);
    }
  }
}

// y[m][0:2W] += sum over n channels of h * packed, for M tokens
template <int M>
void outer_packed(const float* packed, const float* h, int ldh, int n, float* y, int ldy) {
  F acc[M][2];
  for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = zero();
  for (int c = 0; c < n; c++) {
    F left = load(packed + c * 2 * W), right = load(packed + c * 2 * W + W);
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

constexpr int PACKED = 128;        // channels packed at a time
constexpr int PANEL = PACKED + 1;  // their room: lines a page apart push each other out of caches

// y[m][j] += sum over channels of h * down, for n tokens and `cols` columns, a multiple of 2W; they
// come as `half` has them. Rows are read in four places, see above.
template <class T>
void add_rows(const T* down, int64_t stride, int width, const float* h, int n, int cols, float* y,
              int ld) {
  auto add = [&](auto C, int from, int apart) {  // C channels from `from` on
    const bool ask = n >= ASKED_FOR_FROM && C > 1 && from + 1 < apart;
    some_at_a_time<3>(n, [&](auto M, int m) {
      (ask && m == 0 ? outer<T, C, M, true> : outer<T, C, M, false>)(
          down + from * stride, apart * stride, stride, h + from * n + m, apart * n, y + m * ld, ld,
          cols);
    });
  };
  const int apart = width / 4;
  for (int c = 0; c < apart; c++) add(Constant<4>(), c, apart);
  for (int c = 4 * apart; c < width; c++) add(Constant<1>(), c, 1);
}

// The same for many tokens; `packed` has room for `PANEL` rows
template <class T>
void add_panels(const T* down, int64_t stride, int width, const float* h, int n, int cols,
                float* packed, float* y, int ld) {
  for (int c0 = 0; c0 < width; c0 += PACKED) {
    const int count = std::min(PACKED, width - c0);
    for (int c = 0; c < count; c++)
      for (int j = 0; j < cols; j += 2 * W)
        for (int i = 0; i < 2; i++)
          store(packed + j * PANEL + c * 2 * W + i * W, half(down + (c0 + c) * stride + j, i));
    for (int j = 0; j < cols; j += 2 * W)
      some_at_a_time<6>(n, [&](auto M, int m) {
        const float* own = packed + j * PANEL;
        outer_packed<M>(own, h + c0 * n + m, n, count, y + m * ld + j, ld);
      });
  }
}

}  // namespace
