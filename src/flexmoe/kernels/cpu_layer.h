// What a call is about, and its pairs sorted by expert and budget.

#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu_tiles.h"

namespace {

struct Group {  // some pairs of one expert at one budget
  int expert, width, start, n;
  bool tiles;
  int64_t h;  // where its activations begin
  int part;   // the first of its parts (`Parts`)

  int padded() const { return tiles ? up_to(n, TILE) : n; }  // what its blocks are wide
};

struct Strides {  // between values of two experts (ragged: not used), two channels, two within
  int64_t expert, channel, within;
};

struct Stored {  // what stays the same between calls: `_Stored` in cpu.py; shapes in interface.py
  const void *up, *down;
  const int32_t* offset;
  Strides up_by, bias_by, down_by;
  int32_t I, sides, activation, weights_bf16;
};

struct Call {  // `CALL` in cpu.py
  const void *up_bias, *down_bias, *x;
  const int64_t* index;
  const float* weight;
  const int32_t *width, *token_budget;
  float* out;  // what it points to is bfloat16 if x is
  int32_t T, K, E, B, H, budget, x_bf16, threads;
};

struct Layer : Stored, Call {
  bool columns_are_rows() const { return down_by.within != 1; }
  template <class T>
  const T* of(const void* all, const Strides& by, int expert) const {
    return (const T*)all + (offset ? offset[expert] * by.channel : expert * by.expert);
  }
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
  for (int k = 0; k < keys; k++)
    for (int i = start[k], n; i < start[k + 1]; i += n) {
      int e = k / a.B, stored = a.offset ? a.offset[e + 1] - a.offset[e] : a.I;
      int w = std::clamp(a.width[(k % a.B) * a.E + e], 0, stored);
      const int left = start[k + 1] - i;
      bool tiles = a.weights_bf16 && left >= TILES_FROM;
      n = tiles ? std::min(TOGETHER, left) : (left - 1) / ((left - 1) / TOGETHER + 1) + 1;  // alike
      groups.push_back({e, w, i, n, tiles, 0, 0});
    }
}

}  // namespace
