// Matrix products with AVX-512 float32 FMA on bf16 weights. Same interface as matrix_amx.hpp.
//
// Weights are unpacked to float32 in registers, which is exact, and activations stay float32. The bf16 dot-product
// instruction would do: but it starts every second cycle where two FMA start in each (88 against 178 GFLOP/s a core on
// Sapphire Rapids). Every output has one accumulator that takes its inputs in order, so it does not depend on how
// many rows are computed together.
#pragma once
#include <utility>

#include "simd.hpp"

// A register of 16 pairs of bf16, unpacked to float32: the first of each pair, and the second.
struct Pairs {
  __m512 first, second;

  explicit Pairs(const bf16* source) {
    const __m512i raw = _mm512_loadu_si512(source);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))));
  }
};

// sum + a[0] * pairs.first + a[1] * pairs.second
inline __m512 accumulate(__m512 sum, const float* a, const Pairs& pairs) {
  return _mm512_fmadd_ps(_mm512_set1_ps(a[1]), pairs.second, _mm512_fmadd_ps(_mm512_set1_ps(a[0]), pairs.first, sum));
}

// Calls work<rows>() for a number of rows known only now, 1 <= rows <= LIMIT.
template <int LIMIT, class Work>
inline void with_rows(int rows, Work&& work) {
  if constexpr (LIMIT > 1) {
    if (rows < LIMIT) return with_rows<LIMIT - 1>(rows, std::forward<Work>(work));
  }
  work(std::integral_constant<int, LIMIT>{});
}

// Loops over rows are unrolled, all of them: an accumulator that is indexed anywhere at run time lives in memory.
struct Matrix {
  using Input = float;
  static constexpr int BLOCK_ROWS = 12;  // 24 accumulators, 4 halves of panels, 2 broadcasts: 30 of 32 registers

  // Rows of a block, so that no block is left with few.
  static int block_rows(int num_rows) {
    const int blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    return (num_rows + blocks - 1) / blocks;
  }

  static void begin_product(int) {}
  static void begin_scores(int) {}
  static void begin_values(int) {}
  static void end() {}

  // scratch[rows][32] = a[rows][32 * steps] times one packed group, asking for LINES cache lines a pair from ahead on.
  template <int LINES>
  static void product(const float* a, int inputs, int rows, const bf16* w, int steps, float* scratch, const char* ahead) {
    with_rows<BLOCK_ROWS>(rows, [&](auto count) { product_rows<count(), LINES>(a, inputs, w, steps, scratch, ahead); });
  }

  template <int ROWS, int LINES>
  static void product_rows(const float* a, int inputs, const bf16* w, int steps, float* scratch, const char* ahead) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int step = 0; step < steps; ++step, a += 32, w += 2 * TILE_ELEMENTS) {
      for (int pair = 0; pair < 16; ++pair) {
        // A few at a time: a burst would fill the line buffers and stall the loads behind it.
        for (int line = 0; line < LINES; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        const Pairs left(w + pair * 32), right(w + TILE_ELEMENTS + pair * 32);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
          const float* row = a + r * inputs + pair * 2;
          const __m512 first = _mm512_set1_ps(row[0]), second = _mm512_set1_ps(row[1]);
          sums[r][0] = _mm512_fmadd_ps(first, left.first, sums[r][0]);
          sums[r][1] = _mm512_fmadd_ps(first, right.first, sums[r][1]);
          sums[r][0] = _mm512_fmadd_ps(second, left.second, sums[r][0]);
          sums[r][1] = _mm512_fmadd_ps(second, right.second, sums[r][1]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      _mm512_storeu_ps(scratch + r * GROUP, sums[r][0]);
      _mm512_storeu_ps(scratch + r * GROUP + 16, sums[r][1]);
    }
  }

  // Sums that wait for each other leave the units idle: with few rows, several registers of outputs go side by side.
  static constexpr int side_by_side(int rows) { return rows <= 4 ? 4 : rows <= 8 ? 2 : 1; }

  // out[rows][end], rows apart by stride: queries [rows][head_dim] times the keys of sub-blocks begin..end.
  template <class SubBlock>
  static void scores(SubBlock&& sub_block, const float* queries, int rows, int head_dim, int begin, int end, float* out,
                     int stride) {
    with_rows<16>(rows, [&](auto count) {
      constexpr int ROWS = count(), SPAN = side_by_side(ROWS);
      int at = begin;
      for (; at + 16 * (SPAN - 1) < end; at += 16 * SPAN)
        scores_rows<ROWS, SPAN>(sub_block, queries, head_dim, at, out, stride);
      for (; at < end; at += 16) scores_rows<ROWS, 1>(sub_block, queries, head_dim, at, out, stride);
    });
  }

  template <int ROWS, int SPAN, class SubBlock>
  static void scores_rows(SubBlock&& sub_block, const float* queries, int head_dim, int at, float* out, int stride) {
    __m512 sums[SPAN][ROWS];
    const bf16* keys[SPAN];
#pragma GCC unroll 4
    for (int i = 0; i < SPAN; ++i) {
      keys[i] = sub_block(at + 16 * i);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[i][r] = _mm512_setzero_ps();
    }
    for (int d = 0; d < head_dim; d += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < SPAN; ++i) {
        const Pairs key(keys[i] + d * 16);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) sums[i][r] = accumulate(sums[i][r], queries + r * head_dim + d, key);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < SPAN; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(out + int64_t(r) * stride + at + 16 * i, sums[i][r]);
    }
  }

  // out[rows][head_dim] = weights [rows][end], rows apart by stride, times the values of sub-blocks begin..end.
  template <class SubBlock>
  static void values(SubBlock&& sub_block, const float* weights, int rows, int head_dim, int begin, int end, int stride,
                     float* out) {
    with_rows<16>(rows, [&](auto count) {
      constexpr int ROWS = count(), WIDTH = side_by_side(ROWS);
      int d = 0;
      for (; d + 16 * WIDTH <= head_dim; d += 16 * WIDTH)
        values_rows<ROWS, WIDTH>(sub_block, weights, head_dim, d, begin, end, stride, out + d);
      if constexpr (WIDTH == 4)
        if (d < head_dim) values_rows<ROWS, 2>(sub_block, weights, head_dim, d, begin, end, stride, out + d);
    });
  }

  template <int ROWS, int WIDTH, class SubBlock>
  static void values_rows(SubBlock&& sub_block, const float* weights, int head_dim, int d, int begin, int end,
                          int stride, float* out) {
    __m512 sums[WIDTH][ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[i][r] = _mm512_setzero_ps();
    }
    for (int at = begin; at < end; at += 16) {
      const bf16* block = sub_block(at) + d * 2;
      for (int pair = 0; pair < 8; ++pair) {
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) {
          const Pairs value(block + (pair * head_dim + i * 16) * 2);
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; ++r)
            sums[i][r] = accumulate(sums[i][r], weights + int64_t(r) * stride + at + pair * 2, value);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(out + r * head_dim + 16 * i, sums[i][r]);
    }
  }
};
