// Matrix products with float32 FMA on bf16 weights, for AVX-512 and AVX2. Same interface as matrix_amx.hpp.
//
// Weights are unpacked to float32 in registers, which is exact, and activations stay float32. The bf16 dot-product
// instruction of AVX-512 would do: but it starts every second cycle where two FMA start in each (88 against 178
// GFLOP/s a core on Sapphire Rapids). Every output has one accumulator that takes its inputs in order, so it does not
// depend on how many rows are computed together.
#pragma once
#include <utility>

#include "simd.hpp"

// Sums are kept in registers: those of a block of rows (at most ROWS), in one column of 16 outputs or several side by
// side (at most SUMS in all). Sums that wait for each other leave the units idle, so few rows get several columns; a
// register too many is spilled in the inner loop.
#ifdef __AVX512F__
// 32 registers: 24 sums, both halves of 2 columns of weights, 2 broadcasts: 30.
constexpr int PRODUCT_ROWS = 12, PRODUCT_SUMS = 24, ATTENTION_ROWS = 16, ATTENTION_SUMS = 16;
constexpr int HALVES_AT_ONCE = 2;
#else
// 16 registers, two to a column: 5 sums, half a column of weights, a broadcast, a mask: 14. A sixth sum would fit, but
// GCC then moves registers about (37 GFLOP/s a core instead of 39 on Zen 1, whose limit is 41).
constexpr int PRODUCT_ROWS = 5, PRODUCT_SUMS = 4, ATTENTION_ROWS = 5, ATTENTION_SUMS = 4;
constexpr int HALVES_AT_ONCE = 1;
#endif

constexpr int side_by_side(int rows, int limit, int sums) {
  return limit > 1 && rows * limit > sums ? side_by_side(rows, limit / 2, sums) : limit;
}

// sums[c][r] += a[r][0] · the firsts of pairs[c] + a[r][1] · the seconds; rows of a are apart by stride.
//
// Loops over sums are unrolled, all of them: an accumulator that is indexed anywhere at run time lives in memory.
template <int COLUMNS, int ROWS>
inline void accumulate(Floats (&sums)[COLUMNS][ROWS], const float* a, int stride, int at, const bf16* const* pairs) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half += HALVES_AT_ONCE) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float* row = a + r * stride + at;
#pragma GCC unroll 2
      for (int h = half; h < half + HALVES_AT_ONCE; ++h) {
        const Floats input = set1(row[h]);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c)
          sums[c][r] = add_product(sums[c][r], input, h ? load_second(pairs[c]) : load_first(pairs[c]));
      }
    }
  }
}

template <int COLUMNS, int ROWS>
inline void clear(Floats (&sums)[COLUMNS][ROWS]) {
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[c][r] = zeros();
  }
}

// Columns are 16 floats apart, rows by stride.
template <int COLUMNS, int ROWS>
inline void store(float* target, int64_t stride, const Floats (&sums)[COLUMNS][ROWS]) {
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) store(target + r * stride + 16 * c, sums[c][r]);
  }
}

template <int COLUMNS, int ROWS>
inline void load(const float* source, int64_t stride, Floats (&sums)[COLUMNS][ROWS]) {
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[c][r] = load(source + r * stride + 16 * c);
  }
}

// Calls work<rows>() for a number of rows known only now, 1 <= rows <= LIMIT.
template <int LIMIT, class Work>
inline void with_rows(int rows, Work&& work) {
  if constexpr (LIMIT > 1) {
    if (rows < LIMIT) return with_rows<LIMIT - 1>(rows, std::forward<Work>(work));
  }
  work(std::integral_constant<int, LIMIT>{});
}

// Rows of a block, at most limit, so that no block is left with few.
inline int even_blocks(int num_rows, int limit) {
  const int blocks = (num_rows + limit - 1) / limit;
  return (num_rows + blocks - 1) / blocks;
}

struct Matrix {
  using Input = float;
  static constexpr int BLOCK_ROWS = PRODUCT_ROWS;

  static int block_rows(int num_rows) { return even_blocks(num_rows, BLOCK_ROWS); }

  static void begin_product(int) {}
  static void begin_scores(int) {}
  static void begin_values(int) {}
  static void end() {}

  // scratch[rows][32] = a[rows][32 * steps] times one packed group, asking for 16 · LINES cache lines a step from
  // ahead on.
  template <int LINES>
  static void product(const float* a, int inputs, int rows, const bf16* w, int steps, float* scratch, const char* ahead) {
    with_rows<BLOCK_ROWS>(rows, [&](auto count) { product_rows<count(), LINES>(a, inputs, w, steps, scratch, ahead); });
  }

  // Where only one panel has room in the registers, the two take turns every few steps, so that memory is still read
  // nearly in order; then each has half of the pairs that the lines are spread over.
  template <int ROWS, int LINES>
  static void product_rows(const float* a, int inputs, const bf16* w, int steps, float* scratch, const char* ahead) {
    constexpr int PANELS = side_by_side(ROWS, 2, PRODUCT_SUMS), STEPS_A_TURN = 4;
    constexpr int LINES_RIGHT = LINES / 2, LINES_LEFT = LINES - LINES_RIGHT;
    std::memset(scratch, 0, ROWS * GROUP * sizeof(float));
    if constexpr (PANELS == 2) return add_steps<ROWS, 2, LINES>(a, inputs, w, steps, scratch, ahead);
    for (int step = 0; step < steps; step += STEPS_A_TURN, a += STEPS_A_TURN * 32) {
      const int turn = std::min(STEPS_A_TURN, steps - step);
      add_steps<ROWS, 1, LINES_LEFT>(a, inputs, w, turn, scratch, ahead);
      ahead += LINES_LEFT * turn * 16 * 64;
      add_steps<ROWS, 1, LINES_RIGHT>(a, inputs, w + TILE_ELEMENTS, turn, scratch + 16, ahead);
      ahead += LINES_RIGHT * turn * 16 * 64;
      w += turn * 2 * TILE_ELEMENTS;
    }
  }

  // scratch[rows][16 · PANELS] += a[rows][32 * steps] times one or both panels of a packed group. This and its likes
  // below are not inlined: among other code GCC fails to keep the sums in registers.
  template <int ROWS, int PANELS, int LINES>
  __attribute__((noinline)) static void add_steps(const float* a, int inputs, const bf16* w, int steps, float* scratch,
                                                  const char* ahead) {
    Floats sums[PANELS][ROWS];
    load(scratch, GROUP, sums);
    for (int step = 0; step < steps; ++step, a += 32, w += 2 * TILE_ELEMENTS) {
      for (int pair = 0; pair < 16; ++pair) {
        // A few at a time: a burst would fill the line buffers and stall the loads behind it.
        for (int line = 0; line < LINES; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        const bf16* const panels[] = {w + pair * 32, w + TILE_ELEMENTS + pair * 32};
        accumulate(sums, a, inputs, pair * 2, panels);
      }
    }
    store(scratch, GROUP, sums);
  }

  // out[rows][end], rows apart by stride: queries [rows][head_dim] times the keys of sub-blocks begin..end.
  template <class SubBlock>
  static void scores(SubBlock&& sub_block, const float* queries, int rows, int head_dim, int begin, int end, float* out,
                     int stride) {
    attention_blocks(rows, [&](auto count, int first) {
      constexpr int ROWS = count(), SPAN = side_by_side(ROWS, 4, ATTENTION_SUMS);
      const float* block = queries + first * head_dim;
      float* target = out + int64_t(first) * stride;
      int at = begin;
      for (; at + 16 * (SPAN - 1) < end; at += 16 * SPAN)
        scores_rows<ROWS, SPAN>(sub_block, block, head_dim, at, target, stride);
      for (; at < end; at += 16) scores_rows<ROWS, 1>(sub_block, block, head_dim, at, target, stride);
    });
  }

  // Calls work<rows>(first) for blocks of query rows.
  template <class Work>
  static void attention_blocks(int rows, Work&& work) {
    const int size = even_blocks(rows, ATTENTION_ROWS);
    for (int first = 0; first < rows; first += size)
      with_rows<ATTENTION_ROWS>(std::min(size, rows - first), [&](auto count) { work(count, first); });
  }

  template <int ROWS, int SPAN, class SubBlock>
  __attribute__((noinline)) static void scores_rows(SubBlock&& sub_block, const float* queries, int head_dim, int at,
                                                    float* out, int stride) {
    Floats sums[SPAN][ROWS];
    clear(sums);
    const bf16* keys[SPAN];
#pragma GCC unroll 4
    for (int i = 0; i < SPAN; ++i) keys[i] = sub_block(at + 16 * i);
    for (int d = 0; d < head_dim; d += 2) {
      accumulate(sums, queries, head_dim, d, keys);
#pragma GCC unroll 4
      for (int i = 0; i < SPAN; ++i) keys[i] += 32;
    }
    store(out + at, stride, sums);
  }

  // out[rows][head_dim] = weights [rows][end], rows apart by stride, times the values of sub-blocks begin..end; with ONTO
  // added to what out holds, in the same order of sums.
  template <bool ONTO, class SubBlock>
  static void values(SubBlock&& sub_block, const float* weights, int rows, int head_dim, int begin, int end, int stride,
                     float* out) {
    attention_blocks(rows, [&](auto count, int first) {
      constexpr int ROWS = count(), WIDTH = side_by_side(ROWS, 4, ATTENTION_SUMS);
      const float* block = weights + int64_t(first) * stride;
      float* target = out + first * head_dim;
      int d = 0;
      for (; d + 16 * WIDTH <= head_dim; d += 16 * WIDTH)
        values_rows<ONTO, ROWS, WIDTH>(sub_block, block, head_dim, d, begin, end, stride, target + d);
      if constexpr (WIDTH == 4)
        if (d < head_dim) values_rows<ONTO, ROWS, 2>(sub_block, block, head_dim, d, begin, end, stride, target + d);
    });
  }

  template <bool ONTO, int ROWS, int WIDTH, class SubBlock>
  __attribute__((noinline)) static void values_rows(SubBlock&& sub_block, const float* weights, int head_dim, int d,
                                                    int begin, int end, int stride, float* out) {
    Floats sums[WIDTH][ROWS];
    if constexpr (ONTO)
      load(out, head_dim, sums);
    else
      clear(sums);
    for (int at = begin; at < end; at += 16) {
      const bf16* block = sub_block(at) + d * 2;
      for (int pair = 0; pair < 8; ++pair, block += head_dim * 2) {
        const bf16* const values[] = {block, block + 32, block + 64, block + 96};
        accumulate(sums, weights, stride, at + pair * 2, values);
      }
    }
    store(out, head_dim, sums);
  }
};
