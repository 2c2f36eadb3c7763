// A whole decoder step in one call: embedding, layers, final norm, head. One OpenMP region per step.
//
// Weights, keys and values are bf16; the residual stream and all accumulation are float32. Every phase works on rows or
// output columns independently, so a token's result is the same to the bit in any batch.
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "attention.hpp"
#include "head_inputs.hpp"
#include "top.hpp"

extern "C" {

struct LayerWeights {
  const float *attn_norm, *q_norm, *k_norm, *post_attn_norm, *mlp_norm, *post_mlp_norm;  // offset folded in
  const float *qkv_bias, *o_bias;
  const bf16 *qkv, *o, *gate_up, *down;   // packed
  const float *cos, *sin;                 // [max_model_len][D/2]
  int32_t window, unused;                 // 0: none
};

struct Model {
  const LayerWeights* layers;
  const bf16 *head, *embed;  // packed; row-major, or null when tied to head
  const float* final_norm;
  int32_t vocab, hidden, heads, kv_heads, head_dim, intermediate, activation, unused;
  float norm_eps, embedding_scale, attention_scale, logit_softcap;
};

struct Step {
  const int64_t *token_ids, *positions, *slots, *logit_rows;
  const int32_t *query_start, *context_lens, *block_tables, *layers, *capture;
  const uint64_t* tree_mask;  // [T][2], or null: all tokens are causal
  bf16 *const *keys, *const *values;
  float *logits, *captured;  // [N][vocab]; [num_capture][T][hidden]
  int32_t num_tokens, num_rows, num_logits, max_blocks, block_size, num_layers, num_capture, num_threads;
};

struct Moves {
  bf16 *const *keys, *const *values;
  const int64_t *sources, *destinations;
  int32_t num_slots, num_layers, block_size, kv_heads, head_dim;
};

// 0, or -1 if the kernel refuses AMX.
int specdec_enable_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return int(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA));
}

void specdec_advise_huge_pages(void* start, size_t size) { madvise(start, size, MADV_HUGEPAGE); }
}

namespace {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Buffers of a step; they grow and are kept.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  void reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + (1 << 21) - 1) >> 21 << 21;
      memory_ = std::aligned_alloc(64, size_);
      std::memset(memory_, 0, size_);
    }
    used_ = 0;
  }

  template <class T>
  T* take(size_t count) {
    T* start = reinterpret_cast<T*>(static_cast<char*>(memory_) + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return start;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

struct Buffers {
  float *x, *projected, *qkv;
  Input *normed, *queries, *attended, *hidden;
  std::vector<AttentionBuffers> attention;
};

class StepRunner {
 public:
  StepRunner(const Model& model, const Step& step, Workspace& workspace) : m_(model), s_(step) {
    qkv_size_ = (m_.heads + 2 * m_.kv_heads) * m_.head_dim;
    cache_ = {s_.block_size, m_.kv_heads, m_.head_dim};
    plan_attention();
    allocate(workspace);
  }

  void run() {
#pragma omp parallel num_threads(s_.num_threads)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      embed(thread, threads);
      for (int i = 0; i < s_.num_layers; ++i) {
        layer(s_.layers[i], thread, threads);
        capture(s_.layers[i], thread, threads);
      }
#pragma omp barrier
      head(thread, threads);
    }
  }

 private:
  void plan_attention() {
    const int share = m_.heads / m_.kv_heads, per_tile = 16 / share;
    if (s_.tree_mask) paths_.resize(s_.num_tokens);
    for (int row = 0; row < s_.num_rows; ++row) {
      const int first = s_.query_start[row], count = s_.query_start[row + 1] - first, context = s_.context_lens[row];
      const int32_t* table = s_.block_tables + int64_t(row) * s_.max_blocks;
      const Path* paths = s_.tree_mask ? plan_paths(first, count) : nullptr;
      longest_ = std::max(longest_, context + count);
      for (int at = 0; at < count; at += per_tile)
        for (int h = 0; h < m_.kv_heads; ++h) {
          AttentionItem item{first + at, std::min(per_tile, count - at), context + at, 0, h, table};
          item.end = item.position + item.num_tokens;
          if (paths) {
            item.position = context;
            item.end = context + count;
            item.paths = paths + at;
            item.positions = s_.positions + first;
          }
          items_.push_back(item);
        }
    }
  }

  // Null if all tokens of the row are causal.
  const Path* plan_paths(int first, int count) {
    const uint64_t* mask = s_.tree_mask + int64_t(first) * 2;
    if (std::none_of(mask, mask + count * 2, [](uint64_t word) { return word; })) return nullptr;
    for (int i = 0; i < count; ++i, mask += 2) {
      Path& path = paths_[first + i];
      path = {s_.positions[first + i], 0};
      const bool is_causal = !(mask[0] | mask[1]);
      for (int j = 0; j < count; ++j)
        if (is_causal ? j <= i : mask[j / 64] >> j % 64 & 1) path.tokens[path.length++] = uint8_t(j);
    }
    return paths_.data() + first;
  }

  void allocate(Workspace& workspace) {
    const size_t tokens = round_up(std::max(s_.num_tokens, s_.num_logits), 32), length = row_stride(longest_);
    const size_t q_size = size_t(m_.heads) * m_.head_dim, d = m_.head_dim;
    const size_t per_token = 8 * m_.hidden + 4 * qkv_size_ + sizeof(Input) * (m_.hidden + 2 * q_size + m_.intermediate);
    const size_t per_thread = 16 * (sizeof(Input) + 4) * (d + length) + 2 * TAIL_TOKENS * d + 1024;
    workspace.reserve(tokens * per_token + per_thread * s_.num_threads + 4096);
    b_.x = workspace.take<float>(tokens * m_.hidden);
    b_.projected = workspace.take<float>(tokens * m_.hidden);
    b_.qkv = workspace.take<float>(tokens * qkv_size_);
    b_.normed = workspace.take<Input>(tokens * m_.hidden);
    b_.queries = workspace.take<Input>(tokens * q_size);
    b_.attended = workspace.take<Input>(tokens * q_size);
    b_.hidden = workspace.take<Input>(tokens * m_.intermediate);
    for (int i = 0; i < s_.num_threads; ++i)
      b_.attention.push_back({workspace.take<Input>(16 * d), workspace.take<float>(16 * length),
                              workspace.take<Input>(16 * length), workspace.take<float>(16 * d),
                              workspace.take<bf16>(TAIL_TOKENS * d)});
  }

  template <class Work>
  static void split(int count, int thread, int threads, Work&& work) {
    for (int i = int(int64_t(count) * thread / threads); i < int(int64_t(count) * (thread + 1) / threads); ++i) work(i);
  }

  void embed(int thread, int threads) {
    split(s_.num_tokens, thread, threads, [&](int t) {
      const int64_t id = s_.token_ids[t];
      float* x = b_.x + int64_t(t) * m_.hidden;
      if (m_.embed) {
        for (int i = 0; i < m_.hidden; ++i) x[i] = to_float(m_.embed[id * m_.hidden + i]);
      } else {  // gather from the packed head: [group][K/32][panel][pair][output][2]
        const bf16* base = m_.head + id / GROUP * m_.hidden * GROUP + id % GROUP / 16 * TILE_ELEMENTS + id % 16 * 2;
        for (int i = 0; i < m_.hidden; i += 2) {
          const bf16* pair = base + int64_t(i / 32) * 2 * TILE_ELEMENTS + i % 32 / 2 * 32;
          x[i] = to_float(pair[0]);
          x[i + 1] = to_float(pair[1]);
        }
      }
      if (m_.embedding_scale != 1.0f)
        for (int i = 0; i < m_.hidden; ++i) x[i] *= m_.embedding_scale;
    });
  }

  void layer(int index, int thread, int threads) {
    const LayerWeights& w = m_.layers[index];
    norm_rows(w.attn_norm, thread, threads);
#pragma omp barrier
    const Packed qkv{w.qkv, qkv_size_, m_.hidden};
    gemm(b_.normed, s_.num_tokens, qkv, thread, threads, [&](int row, int rows, int group, const float* block) {
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < GROUP; c += 16) {
          Floats value = load(block + r * GROUP + c);
          if (w.qkv_bias) value = value + load(w.qkv_bias + group * GROUP + c);
          store(b_.qkv + int64_t(row + r) * qkv_size_ + group * GROUP + c, value);
        }
    });
#pragma omp barrier
    rotate_and_store(w, s_.keys[index], s_.values[index], thread, threads);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < int(items_.size()); ++i)
      attend(items_[i], b_.queries, s_.keys[index], s_.values[index], cache_, m_.heads, w.window, b_.attention[thread],
             b_.attended);
    const Packed o{w.o, m_.hidden, m_.heads * m_.head_dim};
    project(b_.attended, o, w.o_bias, w.post_attn_norm, thread, threads);
#pragma omp barrier
    norm_rows(w.mlp_norm, thread, threads);
#pragma omp barrier
    const Packed gate_up{w.gate_up, 2 * m_.intermediate, m_.hidden};
    gemm(b_.normed, s_.num_tokens, gate_up, thread, threads, [&](int row, int rows, int group, const float* block) {
      for (int r = 0; r < rows; ++r) {
        const Floats gate = activate(load(block + r * GROUP), m_.activation);
        store(b_.hidden + int64_t(row + r) * m_.intermediate + group * 16, gate * load(block + r * GROUP + 16));
      }
    });
#pragma omp barrier
    const Packed down{w.down, m_.hidden, m_.intermediate};
    project(b_.hidden, down, nullptr, w.post_mlp_norm, thread, threads);
#pragma omp barrier
  }

  // x = x + a·W (+ bias), the product normalised first if the family has post-norms.
  void project(const Input* a, const Packed& w, const float* bias, const float* post_norm, int thread, int threads) {
    float* target = post_norm ? b_.projected : b_.x;
    gemm(a, s_.num_tokens, w, thread, threads, [&](int row, int rows, int group, const float* block) {
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < GROUP; c += 16) {
          float* out = target + int64_t(row + r) * m_.hidden + group * GROUP + c;
          Floats value = load(block + r * GROUP + c);
          if (bias) value = value + load(bias + group * GROUP + c);
          if (!post_norm) value = value + load(out);
          store(out, value);
        }
    });
    if (!post_norm) return;
#pragma omp barrier
    split(s_.num_tokens, thread, threads, [&](int t) {
      float *projected = b_.projected + int64_t(t) * m_.hidden, *x = b_.x + int64_t(t) * m_.hidden;
      rms_norm_row(projected, post_norm, m_.hidden, m_.norm_eps, projected);
      for (int i = 0; i < m_.hidden; ++i) x[i] += projected[i];
    });
  }

  void norm_rows(const float* weight, int thread, int threads) {
    split(s_.num_tokens, thread, threads, [&](int t) {
      rms_norm_row(b_.x + int64_t(t) * m_.hidden, weight, m_.hidden, m_.norm_eps, b_.normed + int64_t(t) * m_.hidden);
    });
  }

  // Per token and head: qk-norm, rotation, scaled queries, keys and values into the cache.
  void rotate_and_store(const LayerWeights& w, bf16* keys, bf16* values, int thread, int threads) {
    const int d = m_.head_dim, all = m_.heads + 2 * m_.kv_heads;
    split(s_.num_tokens * all, thread, threads, [&](int i) {
      const int t = i / all, h = i % all;
      float* head = b_.qkv + int64_t(t) * qkv_size_ + h * d;
      if (h >= m_.heads + m_.kv_heads) {
        store_value(values, cache_, s_.slots[t], h - m_.heads - m_.kv_heads, head);
        return;
      }
      const bool is_query = h < m_.heads;
      const float* norm = is_query ? w.q_norm : w.k_norm;
      if (norm) rms_norm_row(head, norm, d, m_.norm_eps, head);
      const float *cos = w.cos + s_.positions[t] * (d / 2), *sin = w.sin + s_.positions[t] * (d / 2);
      for (int j = 0; j < d / 2; ++j) {
        const float a = head[j], b = head[j + d / 2];
        head[j] = a * cos[j] - b * sin[j];
        head[j + d / 2] = b * cos[j] + a * sin[j];
      }
      if (!is_query) {
        store_key(keys, cache_, s_.slots[t], h - m_.heads, head);
        return;
      }
      Input* query = b_.queries + (int64_t(t) * m_.heads + h) * d;
      const Floats scale = set1(m_.attention_scale);
      for (int j = 0; j < d; j += 16) store(query + j, load(head + j) * scale);
    });
  }

  void capture(int index, int thread, int threads) {
    for (int i = 0; i < s_.num_capture; ++i)
      if (s_.capture[i] == index)
        split(s_.num_tokens, thread, threads, [&](int t) {
          std::memcpy(s_.captured + (int64_t(i) * s_.num_tokens + t) * m_.hidden, b_.x + int64_t(t) * m_.hidden,
                      m_.hidden * 4);
        });
  }

  void head(int thread, int threads) {
    split(s_.num_logits, thread, threads, [&](int n) {
      rms_norm_row(b_.x + s_.logit_rows[n] * m_.hidden, m_.final_norm, m_.hidden, m_.norm_eps,
                        b_.normed + int64_t(n) * m_.hidden);
    });
#pragma omp barrier
    if (s_.num_logits == 0) return;
    const Packed head{m_.head, round_up(m_.vocab, GROUP), m_.hidden};
    gemm(b_.normed, s_.num_logits, head, thread, threads, [&](int row, int rows, int group, const float* block) {
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < GROUP; c += 16) {
          const int column = group * GROUP + c;
          if (column >= m_.vocab) break;
          Floats value = load(block + r * GROUP + c);
          if (m_.logit_softcap > 0) {  // cap · tanh(x / cap), with tanh(y) = 1 - 2 / (1 + exp(2y))
            const Floats one = set1(1.0f), e = exp(value * set1(2.0f / m_.logit_softcap));
            value = set1(m_.logit_softcap) * (one - set1(2.0f) / (one + e));
          }
          store_first(s_.logits + int64_t(row + r) * m_.vocab + column, value, m_.vocab - column);
        }
    });
  }

  const Model& m_;
  const Step& s_;
  CacheShape cache_;
  Buffers b_;
  std::vector<AttentionItem> items_;
  std::vector<Path> paths_;  // of each token, in steps with trees
  int qkv_size_ = 0, longest_ = 1;
};

}  // namespace

extern "C" {

void* specdec_new_workspace() { return new Workspace; }
void specdec_free_workspace(void* workspace) { delete static_cast<Workspace*>(workspace); }

void specdec_forward(const Model* model, const Step* step, void* workspace) {
  StepRunner(*model, *step, *static_cast<Workspace*>(workspace)).run();
}

void specdec_head_inputs(const HeadFront* front, const FrontStep* step, void* workspace) {
  Workspace& memory = *static_cast<Workspace*>(workspace);
  const size_t tokens = round_up(step->num_tokens, 32), size = front->hidden;
  memory.reserve((sizeof(Input) * (front->num_layers + 2) + 4) * tokens * size + 4 * step->num_threads * size + 256);
  FrontBuffers buffers{memory.take<Input>(tokens * front->num_layers * size), memory.take<Input>(tokens * 2 * size),
                       memory.take<float>(tokens * size), memory.take<float>(step->num_threads * size)};
  HeadFrontRunner(*front, *step, buffers).run();
}

// places and, unless null, log_probs [rows][k], see top_of_row; k <= MAX_TOP.
void specdec_top(const float* values, int64_t* places, float* log_probs, int32_t rows, int32_t size, int32_t k,
                 int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int row = 0; row < rows; ++row)
    top_of_row(values + int64_t(row) * size, size, k, places + int64_t(row) * k,
               log_probs ? log_probs + int64_t(row) * k : nullptr);
}

void specdec_move_slots(const Moves* moves) {
  const Moves& m = *moves;
  std::vector<bf16> held(size_t(m.num_slots) * 2 * m.kv_heads * m.head_dim);
  for (int i = 0; i < m.num_layers; ++i)
    move_slots(m.keys[i], m.values[i], {m.block_size, m.kv_heads, m.head_dim}, m.sources, m.destinations, m.num_slots,
               held.data());
}
}
