// The paged KV cache, laid out for dot products of pairs. Per block and KV head, in sub-blocks of 16 tokens:
//   K [D/2][16 tokens][2]   so that one register holds a pair of dimensions of 16 keys,
//   V [8 token pairs][D][2] so that one register holds a pair of tokens in 16 dimensions.
#pragma once
#include "simd.hpp"

struct CacheShape {
  int block_size, kv_heads, head_dim;

  int64_t block_elements() const { return int64_t(kv_heads) * block_size * head_dim; }
  // Where the sub-block of 16 tokens that holds slot starts, for one KV head.
  int64_t sub_block(int64_t block, int head, int offset) const {
    return block * block_elements() + (int64_t(head) * block_size + offset / 16 * 16) * head_dim;
  }
  // Where a token's key starts: its pairs of dimensions are 32 elements apart.
  int64_t key(int64_t slot, int head) const {
    const int offset = int(slot % block_size);
    return sub_block(slot / block_size, head, offset) + offset % 16 * 2;
  }
  // Where a token's value starts: its dimensions are 2 elements apart.
  int64_t value(int64_t slot, int head) const {
    const int offset = int(slot % block_size);
    return sub_block(slot / block_size, head, offset) + value_in_tokens(offset % 16);
  }
  // The same among sub-blocks that follow one another.
  int64_t value_in_tokens(int token) const { return int64_t(token / 2) * head_dim * 2 + token % 2; }
};

inline void store_key(bf16* cache, const CacheShape& shape, int64_t slot, int head, const float* key) {
  bf16* target = cache + shape.key(slot, head);
  for (int d = 0; d < shape.head_dim; d += 2) {
    target[d * 16] = to_bf16(key[d]);
    target[d * 16 + 1] = to_bf16(key[d + 1]);
  }
}

inline void store_value(bf16* cache, const CacheShape& shape, int64_t slot, int head, const float* value) {
  bf16* target = cache + shape.value(slot, head);
  for (int d = 0; d < shape.head_dim; ++d) target[d * 2] = to_bf16(value[d]);
}

// The first count tokens of a sub-block of values, and zeros for the rest: what was left there, by whomever, may be NaN,
// and a masked key's weight of zero does not stop a NaN.
inline void copy_values(const bf16* source, int count, int head_dim, bf16* target) {
  for (int pair = 0; pair < 8; ++pair, source += head_dim * 2, target += head_dim * 2) {
    const int kept = count - pair * 2;
    if (kept >= 2) std::memcpy(target, source, head_dim * 2 * sizeof(bf16));
    if (kept < 2) std::memset(target, 0, head_dim * 2 * sizeof(bf16));
    if (kept == 1)
      for (int d = 0; d < head_dim; ++d) target[d * 2] = source[d * 2];
  }
}

// Moves the keys and values of single tokens of one layer; held is for all of them, [count][kv_heads][2][D].
inline void move_slots(bf16* keys, bf16* values, const CacheShape& shape, const int64_t* sources,
                       const int64_t* destinations, int count, bf16* held) {
  const int heads = shape.kv_heads, head_dim = shape.head_dim;
  const auto each = [&](const int64_t* slots, auto&& copy) {
    for (int i = 0; i < count * heads; ++i)
      copy(keys + shape.key(slots[i / heads], i % heads), values + shape.value(slots[i / heads], i % heads),
           held + int64_t(i) * 2 * head_dim);
  };
  each(sources, [&](const bf16* key, const bf16* value, bf16* target) {
    for (int d = 0; d < head_dim; d += 2) std::memcpy(target + d, key + d * 16, 2 * sizeof(bf16));
    for (int d = 0; d < head_dim; ++d) target[head_dim + d] = value[d * 2];
  });
  each(destinations, [&](bf16* key, bf16* value, const bf16* source) {
    for (int d = 0; d < head_dim; d += 2) std::memcpy(key + d * 16, source + d, 2 * sizeof(bf16));
    for (int d = 0; d < head_dim; ++d) value[d * 2] = source[head_dim + d];
  });
}
