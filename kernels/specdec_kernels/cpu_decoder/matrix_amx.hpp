// Matrix products with AMX tiles. Same interface as matrix_fma.hpp.
//
// Tile rows are independent and K is never split, so an output does not depend on the other rows of its tile.
#pragma once
#include "simd.hpp"
#ifdef SPECDEC_EMULATE_TILES
#include "tile_emulation.hpp"
#endif

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int row_bytes) {
    rows[tile] = uint8_t(num_rows);
    colsb[tile] = uint16_t(row_bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "the hardware reads 64 bytes");


struct Matrix {
  using Input = bf16;
  static constexpr int BLOCK_ROWS = 32;

  static int block_rows(int) { return BLOCK_ROWS; }

  // Tiles 0-3 accumulate, 4-5 hold rows of A, 6-7 panels of W.
  static void begin_product(int num_rows) {
    const int rows_a = std::min(num_rows, 16), rows_b = num_rows > 16 && num_rows <= 32 ? num_rows - 16 : 16;
    TileConfig config;
    for (int tile : {0, 1, 4}) config.set(tile, rows_a, 64);
    for (int tile : {2, 3, 5}) config.set(tile, rows_b, 64);
    for (int tile : {6, 7}) config.set(tile, 16, 64);
    _tile_loadconfig(&config);
  }

  static void end() { _tile_release(); }

  // scratch[rows][32] = a[rows][32 * steps] times one packed group, asking for 16 · LINES cache lines a step from
  // ahead on. Rows of A are readable up to a multiple of 16.
  template <int LINES>
  static void product(const bf16* a, int inputs, int rows, const bf16* w, int steps, float* scratch,
                      const char* ahead) {
    const int stride = inputs * 2;
    const bf16* b = a + 16 * inputs;
    const bool both = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step, a += 32, b += 32, w += 2 * TILE_ELEMENTS) {
      for (int line = 0; line < 16 * LINES; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      _tile_loadd(4, a, stride);
      _tile_loadd(6, w, 64);
      _tile_loadd(7, w + TILE_ELEMENTS, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, b, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, scratch, GROUP * 4);
    _tile_stored(1, scratch + 16, GROUP * 4);
    if (!both) return;
    _tile_stored(2, scratch + 16 * GROUP, GROUP * 4);
    _tile_stored(3, scratch + 16 * GROUP + 16, GROUP * 4);
  }

  static void begin_scores(int rows) {
    TileConfig config;
    config.set(0, rows, 64);
    config.set(4, rows, 64);
    config.set(5, 16, 64);
    _tile_loadconfig(&config);
  }

  // out[rows][end], rows apart by stride: queries [rows][head_dim] times the keys of sub-blocks begin..end.
  template <class SubBlock>
  static void scores(SubBlock&& sub_block, const bf16* queries, int, int head_dim, int begin, int end, float* out,
                     int stride) {
    for (int at = begin; at < end; at += 16) {
      const bf16* keys = sub_block(at);
      _tile_zero(0);
      for (int d = 0; d < head_dim; d += 32) {
        _tile_loadd(4, queries + d, head_dim * 2);
        _tile_loadd(5, keys + d * 16, 64);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, out + at, stride * 4);
    }
  }

  static void begin_values(int rows) {
    TileConfig config;
    for (int tile : {0, 1}) config.set(tile, rows, 64);
    config.set(4, rows, 32);
    for (int tile : {5, 6}) config.set(tile, 8, 64);
    _tile_loadconfig(&config);
  }

  // out[rows][head_dim] = weights [rows][end], rows apart by stride, times the values of sub-blocks begin..end; with ONTO
  // added to what out holds, in the same order of sums.
  template <bool ONTO, class SubBlock>
  static void values(SubBlock&& sub_block, const bf16* weights, int, int head_dim, int begin, int end, int stride,
                     float* out) {
    for (int d = 0; d < head_dim; d += 32) {
      if (ONTO) {
        _tile_loadd(0, out + d, head_dim * 4);
        _tile_loadd(1, out + d + 16, head_dim * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
      }
      for (int at = begin; at < end; at += 16) {
        const bf16* block = sub_block(at) + d * 2;
        _tile_loadd(4, weights + at, stride * 2);
        _tile_loadd(5, block, head_dim * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, block + 32, head_dim * 4);
        _tile_dpbf16ps(1, 4, 6);
      }
      _tile_stored(0, out + d, head_dim * 4);
      _tile_stored(1, out + d + 16, head_dim * 4);
    }
  }
};
