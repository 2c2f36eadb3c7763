// Matrix products with AVX-512 bf16 dot products. Same interface as matrix_amx.hpp.
//
// Every output has one accumulator that takes its k-pairs in order, so it does not depend on how many rows are
// computed together.
#pragma once
#include <utility>

#include "simd.hpp"

inline __m512bh load_pairs(const bf16* source) { return (__m512bh)_mm512_loadu_si512(source); }

// The same pair of numbers in all lanes.
inline __m512bh broadcast_pair(const bf16* source) {
  int32_t pair;
  std::memcpy(&pair, source, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// Calls work<rows>() for a number of rows known only now, 1 <= rows <= LIMIT.
template <int LIMIT, class Work>
inline void with_rows(int rows, Work&& work) {
  if constexpr (LIMIT > 1) {
    if (rows < LIMIT) return with_rows<LIMIT - 1>(rows, std::forward<Work>(work));
  }
  work(std::integral_constant<int, LIMIT>{});
}

struct Matrix {
  static constexpr int BLOCK_ROWS = 12;  // 24 accumulators, 2 panels, 1 broadcast: 27 of 32 registers

  static void begin_product(int) {}
  static void begin_scores(int) {}
  static void begin_values(int) {}
  static void end() {}

  // scratch[rows][32] = a[rows][32 * steps] times one packed group.
  template <bool STREAM>
  static void product(const bf16* a, int inputs, int rows, const bf16* w, int steps, float* scratch) {
    with_rows<BLOCK_ROWS>(rows, [&](auto count) { product_rows<count(), STREAM>(a, inputs, w, steps, scratch); });
  }

  template <int ROWS, bool STREAM>
  static void product_rows(const bf16* a, int inputs, const bf16* w, int steps, float* scratch) {
    __m512 sums[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int step = 0; step < steps; ++step, a += 32, w += 2 * TILE_ELEMENTS) {
      if (STREAM) prefetch_ahead(w);
      for (int pair = 0; pair < 16; ++pair) {
        const __m512bh left = load_pairs(w + pair * 32), right = load_pairs(w + TILE_ELEMENTS + pair * 32);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
          const __m512bh row = broadcast_pair(a + r * inputs + pair * 2);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, left);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, right);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      _mm512_storeu_ps(scratch + r * GROUP, sums[r][0]);
      _mm512_storeu_ps(scratch + r * GROUP + 16, sums[r][1]);
    }
  }

  // out[rows][16], rows apart by length: queries [rows][head_dim] times one sub-block of keys.
  static void scores(const bf16* keys, const bf16* queries, int rows, int head_dim, float* out, int length) {
    with_rows<16>(rows, [&](auto count) { scores_rows<count()>(keys, queries, head_dim, out, length); });
  }

  template <int ROWS>
  static void scores_rows(const bf16* keys, const bf16* queries, int head_dim, float* out, int length) {
    __m512 sums[ROWS];
    for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ps();
    for (int d = 0; d < head_dim; d += 2) {
      const __m512bh key = load_pairs(keys + d * 16);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
        sums[r] = _mm512_dpbf16_ps(sums[r], broadcast_pair(queries + r * head_dim + d), key);
    }
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(out + int64_t(r) * length, sums[r]);
  }

  // out[rows][head_dim] = weights [rows][length] times the values of sub-blocks begin..end.
  template <class SubBlock>
  static void values(SubBlock&& sub_block, const bf16* weights, int rows, int head_dim, int begin, int end, int length,
                     float* out) {
    with_rows<16>(rows, [&](auto count) {
      for (int d = 0; d < head_dim; d += 16)
        values_rows<count()>(sub_block, weights, head_dim, d, begin, end, length, out + d);
    });
  }

  template <int ROWS, class SubBlock>
  static void values_rows(SubBlock&& sub_block, const bf16* weights, int head_dim, int d, int begin, int end, int length,
                          float* out) {
    __m512 sums[ROWS];
    for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ps();
    for (int at = begin; at < end; at += 16) {
      const bf16* block = sub_block(at) + d * 2;
      for (int pair = 0; pair < 8; ++pair) {
        const __m512bh value = load_pairs(block + pair * head_dim * 2);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
          sums[r] = _mm512_dpbf16_ps(sums[r], broadcast_pair(weights + int64_t(r) * length + at + pair * 2), value);
      }
    }
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(out + r * head_dim, sums[r]);
  }
};
