// Attention of up to 16 query rows (tokens x heads that share a KV head) over one request's paged context.
//
// Scores of the whole context are computed first, then an exact softmax, then P·V in the order of positions. Every
// query row runs through the same arithmetic whether it is alone or in a chunk: masked keys contribute exact zeros.
//
// A token of a tree runs through the arithmetic of its path decoded token by token: the scores and values of the path
// move to where they would be then. They are few; the context is shared.
#pragma once
#include <limits>

#include "cache.hpp"
#include "gemm.hpp"

constexpr int MAX_TREE_TOKENS = 128;
// The context's last, partial sub-block and a path, in whole sub-blocks.
constexpr int TAIL_TOKENS = (15 + MAX_TREE_TOKENS + 15) / 16 * 16;

// What a token of a tree sees of its own step.
struct Path {
  int64_t position;  // of the token
  int length;
  uint8_t tokens[MAX_TREE_TOKENS];  // row-local, ascending
};

// One unit of work: query rows of consecutive tokens of one request, for one KV head.
struct AttentionItem {
  int first_token, num_tokens;
  int position, end, head;  // position of the first token, or of its tree's root; keys are [0, end)
  const int32_t* block_table;
  const Path* paths;         // of the tokens if they are a tree's, else null
  const int64_t* positions;  // of all tokens of the row's tree
};

struct AttentionBuffers {
  Input* queries;  // [16][D]
  float* scores;   // [16][row_stride(longest context)]
  Input* weights;  // [16][row_stride(longest context)]
  float* outputs;  // [16][D]
  bf16* tail;      // [TAIL_TOKENS / 2][D][2]
};

// From a row of scores to the next. Not a multiple of a page: the rows of a column would share one cache set.
inline int row_stride(int context) { return (context + 31) / 32 * 32 + 16; }

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

// Moves the scores of a path behind those of the context: lanes of the softmax are tied to places.
inline void pack_scores(const Path& path, const int64_t* positions, int context, int window, float* scores) {
  for (int i = 0; i < path.length; ++i) {
    const int token = path.tokens[i];
    const bool is_visible = window == 0 || positions[token] > path.position - window;
    scores[context + i] = is_visible ? scores[context + token] : -std::numeric_limits<float>::infinity();
  }
}

// P·V of a tree's tokens: of the whole sub-blocks of context together, then of the rest and its path for each token.
template <class SubBlock>
inline void path_values(const AttentionItem& item, SubBlock&& sub_block, const CacheShape& shape, int share, int begin,
                        int stride, const AttentionBuffers& buffers) {
  const int head_dim = shape.head_dim, context = item.position, whole = context / 16 * 16;
  Matrix::begin_values(item.num_tokens * share);
  Matrix::values<false>(sub_block, buffers.weights, item.num_tokens * share, head_dim, begin, whole, stride,
                        buffers.outputs);
  Matrix::begin_values(share);
  for (int i = 0; i < item.num_tokens; ++i) {
    const Path& path = item.paths[i];
    const int end = context + path.length;
    for (int at = whole; at < end; at += 16)
      copy_values(sub_block(at), context - at, head_dim, buffers.tail + int64_t(at - whole) * head_dim);
    for (int j = 0; j < path.length; ++j) {
      const int from = context + path.tokens[j];
      const bf16* source = sub_block(from) + shape.value_in_tokens(from % 16);
      bf16* target = buffers.tail + shape.value_in_tokens(context + j - whole);
      for (int d = 0; d < head_dim; ++d) target[d * 2] = source[d * 2];
    }
    Matrix::values<true>([&](int at) { return buffers.tail + int64_t(at - whole) * head_dim; },
                         buffers.weights + int64_t(i) * share * stride, share, head_dim, whole, end, stride,
                         buffers.outputs + i * share * head_dim);
  }
}

// queries: [T][heads][D], scaled; out: [T][heads][D].
inline void attend(const AttentionItem& item, const Input* queries, const bf16* keys, const bf16* values,
                   const CacheShape& shape, int num_heads, int window, const AttentionBuffers& buffers, Input* out) {
  const int head_dim = shape.head_dim, share = num_heads / shape.kv_heads, rows = item.num_tokens * share;
  const int end = item.end, padded = (end + 31) / 32 * 32, stride = row_stride(end);
  const int begin = window > 0 ? std::max(0, item.position - window + 1) / 32 * 32 : 0;
  for (int row = 0; row < rows; ++row) {
    const int token = item.first_token + row / share, head = item.head * share + row % share;
    std::memcpy(buffers.queries + row * head_dim, queries + (int64_t(token) * num_heads + head) * head_dim,
                head_dim * sizeof(Input));
  }
  const auto sub_block = [&](const bf16* cache, int at) {
    return cache + shape.sub_block(item.block_table[at / shape.block_size], item.head, at % shape.block_size);
  };
  const auto values_at = [&](int at) { return sub_block(values, at); };
  Matrix::begin_scores(rows);
  Matrix::scores([&](int at) { return sub_block(keys, at); }, buffers.queries, rows, head_dim, begin, end,
                 buffers.scores, stride);
  float sums[16];
  for (int row = 0; row < rows; ++row) {
    float* scores = buffers.scores + int64_t(row) * stride;
    int last = item.position + row / share + 1, first = last - window;
    if (item.paths) {
      const Path& path = item.paths[row / share];
      pack_scores(path, item.positions, item.position, window, scores);
      last = item.position + path.length;
      first = std::min(int(path.position) + 1 - window, item.position);
    }
    first = window > 0 ? std::max(0, first) : 0;
    sums[row] = softmax_row(scores, buffers.weights + int64_t(row) * stride, begin, first, last, padded);
  }
  if (item.paths) {
    path_values(item, values_at, shape, share, begin, stride, buffers);
  } else {
    const int whole = end / 16 * 16;
    if (whole < end) copy_values(values_at(whole), end - whole, head_dim, buffers.tail);
    Matrix::begin_values(rows);
    Matrix::values<false>([&](int at) { return at < whole ? values_at(at) : buffers.tail; }, buffers.weights, rows,
                          head_dim, begin, end, stride, buffers.outputs);
  }
  Matrix::end();
  for (int row = 0; row < rows; ++row) {
    const int token = item.first_token + row / share, head = item.head * share + row % share;
    Input* target = out + (int64_t(token) * num_heads + head) * head_dim;
    const Floats inverse = set1(1.0f / sums[row]);
    for (int d = 0; d < head_dim; d += 16) store(target + d, load(buffers.outputs + row * head_dim + d) * inverse);
  }
}
