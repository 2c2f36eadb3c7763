// C[M, N] = A[M, K] · W[N, K]^T: bf16 weights, float32 accumulated over K in one fixed order.
//
// W is packed for streaming: groups of 32 outputs, [N/32][K/32][2 panels][16 k-pairs][16 outputs][2]. A thread reads
// its groups from start to end, so memory is read once, in order. An element of C sums its products in the same order
// whatever M is, which makes the decoder batch-invariant.
#pragma once
#ifdef SPECDEC_AMX
#include "matrix_amx.hpp"
#else
#include "matrix_avx512.hpp"
#endif

using Input = Matrix::Input;  // of activations: bf16 for AMX, float32 for AVX-512

struct Packed {
  const bf16* data;
  int outputs, inputs;  // outputs padded to a multiple of 32
};

// epilogue(first_row, num_rows, group, scratch) gets each finished block, float32 [num_rows][32].
template <class Epilogue>
void gemm(const Input* a, int num_rows, const Packed& w, int thread, int num_threads, Epilogue&& epilogue) {
  alignas(64) float scratch[Matrix::BLOCK_ROWS * GROUP];
  const int block_rows = Matrix::block_rows(num_rows), steps = w.inputs / 32, groups = w.outputs / GROUP;
  const int first = int(int64_t(groups) * thread / num_threads);
  const int last = int(int64_t(groups) * (thread + 1) / num_threads);
  Matrix::begin_product(num_rows);
  for (int group = first; group < last; ++group) {
    const bf16* panel = w.data + int64_t(group) * steps * 2 * TILE_ELEMENTS;
    for (int row = 0; row < num_rows; row += block_rows) {
      const int rows = std::min(block_rows, num_rows - row);
      const Input* block = a + int64_t(row) * w.inputs;
      // The first pass over a panel streams it from memory, later ones find it in the cache.
      if (row == 0)
        Matrix::product<true>(block, w.inputs, rows, panel, steps, scratch);
      else
        Matrix::product<false>(block, w.inputs, rows, panel, steps, scratch);
      epilogue(row, rows, group, scratch);
    }
  }
  Matrix::end();
}
