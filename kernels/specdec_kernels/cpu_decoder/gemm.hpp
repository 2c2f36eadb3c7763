// C[M, N] = A[M, K] · W[N, K]^T: bf16 weights, float32 accumulated over K in one fixed order.
//
// W is packed for streaming: groups of 32 outputs, [N/32][K/32][2 panels][16 k-pairs][16 outputs][2]. A thread reads
// its groups from start to end, so memory is read once, in order. An element of C sums its products in the same order
// whatever M is, which makes the decoder batch-invariant.
#pragma once
#include <type_traits>

#if defined(__AMX_BF16__) || defined(SPECDEC_EMULATE_TILES)
#include "matrix_amx.hpp"
#else
#include "matrix_fma.hpp"
#endif

using Input = Matrix::Input;  // of activations: bf16 for AMX, float32 for FMA

struct Packed {
  const bf16* data;
  int outputs, inputs;  // outputs padded to a multiple of 32
};

constexpr int PREFETCH_BYTES = 8192;  // how far ahead of their use weights are asked for

// epilogue(first_row, num_rows, group, scratch) gets each finished block, float32 [num_rows][32].
//
// Memory should be busy all the time. With one block of rows, weights are asked for a little ahead of their use; with
// several, the first two blocks ask for the next group's weights, half each, while they compute on cached ones.
template <class Epilogue>
void gemm(const Input* a, int num_rows, const Packed& w, int thread, int num_threads, Epilogue&& epilogue) {
  alignas(64) float scratch[Matrix::BLOCK_ROWS * GROUP];
  const int block_rows = Matrix::block_rows(num_rows), steps = w.inputs / 32, groups = w.outputs / GROUP;
  const int first = int(int64_t(groups) * thread / num_threads);
  const int last = int(int64_t(groups) * (thread + 1) / num_threads);
  const int64_t panel_bytes = int64_t(steps) * 2 * TILE_ELEMENTS * 2;
  Matrix::begin_product(num_rows);
  for (int group = first; group < last; ++group) {
    const char* panel = reinterpret_cast<const char*>(w.data) + group * panel_bytes;
    for (int row = 0, block = 0; row < num_rows; row += block_rows, ++block) {
      const int rows = std::min(block_rows, num_rows - row);
      const Input* source = a + int64_t(row) * w.inputs;
      const auto multiply = [&](auto lines, const char* ahead) {
        Matrix::product<lines()>(source, w.inputs, rows, reinterpret_cast<const bf16*>(panel), steps, scratch, ahead);
      };
      if (block == 0 && (num_rows <= block_rows || group == first))
        multiply(std::integral_constant<int, 2>{}, panel + PREFETCH_BYTES);
      else if (block == 1 && group == first)
        multiply(std::integral_constant<int, 2>{}, panel + panel_bytes);
      else if (block <= 1)
        multiply(std::integral_constant<int, 1>{}, panel + panel_bytes + block * panel_bytes / 2);
      else
        multiply(std::integral_constant<int, 0>{}, panel);
      epilogue(row, rows, group, scratch);
    }
  }
  Matrix::end();
}
