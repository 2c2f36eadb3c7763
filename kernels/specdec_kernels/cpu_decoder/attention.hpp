// Attention of up to 16 query rows (tokens x heads that share a KV head) over one request's paged context.
//
// The cache is laid out for dot products of pairs. Per block and KV head, in sub-blocks of 16 tokens:
//   K [D/2][16 tokens][2]   so that one register holds a pair of dimensions of 16 keys,
//   V [8 token pairs][D][2] so that one register holds a pair of tokens in 16 dimensions.
// Scores of the whole context are computed first, then an exact softmax, then P·V in the order of positions. Every
// query row runs through the same arithmetic whether it is alone or in a chunk: masked keys contribute exact zeros.
#pragma once
#include <limits>

#include "gemm.hpp"

struct CacheShape {
  int block_size, kv_heads, head_dim;

  int64_t block_elements() const { return int64_t(kv_heads) * block_size * head_dim; }
  // Where the sub-block of 16 tokens that holds slot starts, for one KV head.
  int64_t sub_block(int64_t block, int head, int offset) const {
    return block * block_elements() + (int64_t(head) * block_size + offset / 16 * 16) * head_dim;
  }
};

inline void store_key(bf16* cache, const CacheShape& shape, int64_t slot, int head, const float* key) {
  const int offset = int(slot % shape.block_size), token = offset % 16;
  bf16* base = cache + shape.sub_block(slot / shape.block_size, head, offset);
  for (int d = 0; d < shape.head_dim; d += 2) {
    base[(d / 2 * 16 + token) * 2] = to_bf16(key[d]);
    base[(d / 2 * 16 + token) * 2 + 1] = to_bf16(key[d + 1]);
  }
}

inline void store_value(bf16* cache, const CacheShape& shape, int64_t slot, int head, const float* value) {
  const int offset = int(slot % shape.block_size), token = offset % 16;
  bf16* base = cache + shape.sub_block(slot / shape.block_size, head, offset);
  for (int d = 0; d < shape.head_dim; ++d) base[(token / 2 * shape.head_dim + d) * 2 + token % 2] = to_bf16(value[d]);
}

// One unit of work: query rows of consecutive tokens of one request, for one KV head.
struct AttentionItem {
  int first_token, num_tokens, position, head;  // position of the first token
  const int32_t* block_table;
};

struct AttentionBuffers {
  Input* queries;  // [16][D]
  float* scores;   // [16][row_stride(longest context)]
  Input* weights;  // [16][row_stride(longest context)]
  float* outputs;  // [16][D]
  bf16* tail;      // [8 token pairs][D][2]
};

// From a row of scores to the next. Not a multiple of a page: the rows of a column would share one cache set.
inline int row_stride(int context) { return (context + 31) / 32 * 32 + 16; }

// A sub-block of values with zeros from slot count on: what was left there, by whomever, may be NaN, and a masked key's
// weight of zero does not stop a NaN.
inline void copy_values(const bf16* source, int count, int head_dim, bf16* target) {
  for (int pair = 0; pair < 8; ++pair, source += head_dim * 2, target += head_dim * 2) {
    const int kept = count - pair * 2;
    if (kept >= 2) std::memcpy(target, source, head_dim * 2 * sizeof(bf16));
    if (kept < 2) std::memset(target, 0, head_dim * 2 * sizeof(bf16));
    if (kept == 1)
      for (int d = 0; d < head_dim; ++d) target[d * 2] = source[d * 2];
  }
}

// Softmax of scores[first, last) into weights; everything else in [begin, length) becomes 0. Returns the
// sum of the weights. Lanes are tied to absolute positions, so the sum does not depend on begin or length.
inline float softmax_row(const float* scores, Input* weights, int begin, int first, int last, int length) {
  const Floats lowest = set1(-std::numeric_limits<float>::infinity());
  const auto visible = [&](int i) { return select(lanes_between(first - i, last - i), load(scores + i), lowest); };
  Floats peak = lowest;
  for (int i = begin; i < last; i += 16) peak = max(visible(i), peak);
  const Floats top = set1(reduce_max(peak));
  Floats sum = zeros();
  for (int i = begin; i < length; i += 16) {
    const Floats weight = i < last ? exp(visible(i) - top) : zeros();
    sum = sum + weight;
    store(weights + i, weight);
  }
  return reduce_add(sum);
}

// queries: [T][heads][D], scaled; out: [T][heads][D].
inline void attend(const AttentionItem& item, const Input* queries, const bf16* keys, const bf16* values,
                   const CacheShape& shape, int num_heads, int window, const AttentionBuffers& buffers, Input* out) {
  const int head_dim = shape.head_dim, share = num_heads / shape.kv_heads, rows = item.num_tokens * share;
  const int end = item.position + item.num_tokens, padded = (end + 31) / 32 * 32, stride = row_stride(end);
  const int begin = window > 0 ? std::max(0, item.position - window + 1) / 32 * 32 : 0;
  for (int row = 0; row < rows; ++row) {
    const int token = item.first_token + row / share, head = item.head * share + row % share;
    std::memcpy(buffers.queries + row * head_dim, queries + (int64_t(token) * num_heads + head) * head_dim,
                head_dim * sizeof(Input));
  }
  const auto sub_block = [&](const bf16* cache, int at) {
    return cache + shape.sub_block(item.block_table[at / shape.block_size], item.head, at % shape.block_size);
  };
  Matrix::begin_scores(rows);
  Matrix::scores([&](int at) { return sub_block(keys, at); }, buffers.queries, rows, head_dim, begin, end,
                 buffers.scores, stride);
  float sums[16];
  for (int row = 0; row < rows; ++row) {
    const int last = item.position + row / share + 1, first = window > 0 ? std::max(0, last - window) : 0;
    sums[row] = softmax_row(buffers.scores + int64_t(row) * stride, buffers.weights + int64_t(row) * stride, begin, first,
                            last, padded);
  }
  const int whole = end / 16 * 16;
  if (whole < end) copy_values(sub_block(values, whole), end - whole, head_dim, buffers.tail);
  Matrix::begin_values(rows);
  Matrix::values([&](int at) { return at < whole ? sub_block(values, at) : buffers.tail; }, buffers.weights, rows,
                 head_dim, begin, end, stride, buffers.outputs);
  Matrix::end();
  for (int row = 0; row < rows; ++row) {
    const int token = item.first_token + row / share, head = item.head * share + row % share;
    Input* target = out + (int64_t(token) * num_heads + head) * head_dim;
    const Floats inverse = set1(1.0f / sums[row]);
    for (int d = 0; d < head_dim; d += 16) store(target + d, load(buffers.outputs + row * head_dim + d) * inverse);
  }
}
