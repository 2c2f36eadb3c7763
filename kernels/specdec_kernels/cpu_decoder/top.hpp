// The k largest of a row: one pass that looks closer only where a value beats the k-th best so far.
#pragma once
#include <cmath>
#include <limits>

#include "simd.hpp"

constexpr int MAX_TOP = 64;

inline float log_sum_exp(const float* row, int size, float largest) {
  const Floats top = set1(largest);
  Floats sums = zeros();
  int i = 0;
  for (; i + 16 <= size; i += 16) sums = sums + exp(load(row + i) - top);
  float sum = reduce_add(sums);
  for (; i < size; ++i) sum += std::exp(row[i] - largest);
  return largest + std::log(sum);
}

// places[k], largest first; of equal values the first ones. NaN never counts, and a place without a value is -1.
// log_probs[k], unless null: their logarithms after a softmax of the row, minus infinity where there is no value.
inline void top_of_row(const float* row, int size, int k, int64_t* places, float* log_probs) {
  const float lowest = -std::numeric_limits<float>::infinity();
  float best[MAX_TOP];
  std::fill(best, best + k, lowest);
  std::fill(places, places + k, -1);
  const auto insert = [&](float value, int place) {
    int at = k - 1;
    for (; at > 0 && best[at - 1] < value; --at) best[at] = best[at - 1], places[at] = places[at - 1];
    best[at] = value;
    places[at] = place;
  };
  int i = 0;
  for (; i + 16 <= size; i += 16)
    for (unsigned lanes = lanes_above(load(row + i), best[k - 1]); lanes; lanes &= lanes - 1) {
      const int place = i + __builtin_ctz(lanes);
      if (row[place] > best[k - 1]) insert(row[place], place);
    }
  for (; i < size; ++i)
    if (row[i] > best[k - 1]) insert(row[i], i);
  if (!log_probs) return;
  const float log_sum = places[0] < 0 ? 0.0f : log_sum_exp(row, size, best[0]);
  for (int j = 0; j < k; ++j) log_probs[j] = best[j] - log_sum;
}
