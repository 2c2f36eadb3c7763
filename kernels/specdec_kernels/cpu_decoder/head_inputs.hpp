// What a draft head's layer is fed: features from the target's hidden states, joined with token embeddings.
//
//   scaled  = hidden / rms(hidden) * scale + shift             of each captured layer
//   feature = W_fuse · [scaled of all layers], or the only one's scaled
//   x       = W_mix · [norm(embedding); norm(feature)]
#pragma once
#include <cmath>

#include "gemm.hpp"

struct HeadFront {
  const bf16 *fuse, *mix, *embed;  // packed [H][layers · H], or null for one layer; packed [H][2H]; [V][H]
  const float *scale, *shift;      // [layers][H]
  const float *unknown, *embed_norm, *feature_norm;  // [H]
  int32_t hidden, num_layers;
  float norm_eps;
};

struct FrontStep {
  const int64_t* token_ids;  // [T]
  const float* hidden;       // [num_layers][T][H]; or features as they are, [T][H]
  const uint8_t* known;      // [T], whose features are; the others get `unknown`
  float* x;                  // [T][H]
  int32_t num_tokens, is_feature, num_threads;
};

// Scratch of T tokens, rows padded to whole blocks.
struct FrontBuffers {
  Input *scaled, *joined;  // [T][layers · H], [T][2H]
  float *features, *row;   // [T][H], [threads][H]
};

class HeadFrontRunner {
 public:
  HeadFrontRunner(const HeadFront& front, const FrontStep& step, FrontBuffers buffers)
      : f_(front), s_(step), b_(buffers) {}

  void run() {
#pragma omp parallel num_threads(s_.num_threads)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int first = int(int64_t(s_.num_tokens) * thread / threads);
      const int last = int(int64_t(s_.num_tokens) * (thread + 1) / threads);
      float* row = b_.row + int64_t(thread) * f_.hidden;
      if (!s_.is_feature) {
        for (int t = first; t < last; ++t) scale(t, row);
#pragma omp barrier
        if (f_.fuse) product(b_.scaled, {f_.fuse, f_.hidden, f_.num_layers * f_.hidden}, b_.features, thread, threads);
#pragma omp barrier
      }
      for (int t = first; t < last; ++t) join(t, row);
#pragma omp barrier
      product(b_.joined, {f_.mix, f_.hidden, 2 * f_.hidden}, s_.x, thread, threads);
    }
  }

 private:
  void scale(int t, float* row) {
    const int size = f_.hidden;
    for (int layer = 0; layer < f_.num_layers; ++layer) {
      const float* hidden = s_.hidden + (int64_t(layer) * s_.num_tokens + t) * size;
      const float *scale = f_.scale + layer * size, *shift = f_.shift + layer * size;
      float* out = f_.fuse ? row : b_.features + int64_t(t) * size;
      rms_norm_row(hidden, scale, size, f_.norm_eps, out);
      for (int i = 0; i < size; ++i) out[i] += shift[i];
      if (!f_.fuse) return;
      Input* scaled = b_.scaled + (int64_t(t) * f_.num_layers + layer) * size;
      for (int i = 0; i < size; i += 16) store(scaled + i, load(row + i));
    }
  }

  void join(int t, float* row) {
    const int size = f_.hidden;
    const bf16* embedded = f_.embed + s_.token_ids[t] * size;
    for (int i = 0; i < size; ++i) row[i] = to_float(embedded[i]);
    Input* joined = b_.joined + int64_t(t) * 2 * size;
    rms_norm_row(row, f_.embed_norm, size, f_.norm_eps, joined);
    const float* own = (s_.is_feature ? s_.hidden : b_.features) + int64_t(t) * size;
    rms_norm_row(s_.known[t] ? own : f_.unknown, f_.feature_norm, size, f_.norm_eps, joined + size);
  }

  void product(const Input* a, const Packed& w, float* out, int thread, int threads) {
    gemm(a, s_.num_tokens, w, thread, threads, [&](int row, int rows, int group, const float* block) {
      for (int r = 0; r < rows; ++r)
        std::memcpy(out + int64_t(row + r) * f_.hidden + group * GROUP, block + r * GROUP, GROUP * sizeof(float));
    });
  }

  const HeadFront& f_;
  const FrontStep& s_;
  FrontBuffers b_;
};
