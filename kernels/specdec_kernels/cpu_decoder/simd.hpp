// AVX-512 helpers: bf16 conversion, exp, activations, RMSNorm of one row.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline bf16 to_bf16(float value) {
  // Round to nearest even; a NaN must stay one.
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline __m512 load_bf16(const bf16* source) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store_bf16(bf16* target, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(value));
}

// exp(x) to about 1 ulp: 2^n * p(r) with x = n ln2 + r, |r| <= ln2 / 2. -inf gives 0, NaN stays NaN.
inline __m512 exp512(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.0f), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(tiny, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

enum Activation { SILU = 0, GELU_TANH = 1 };

inline __m512 activate(__m512 x, int kind) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if (kind == SILU) return _mm512_div_ps(x, _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
  // 0.5 x (1 + tanh(y)) = x / (1 + exp(-2y)), y = sqrt(2/pi) (x + 0.044715 x^3).
  const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
  const __m512 y2 = _mm512_mul_ps(_mm512_add_ps(x, cubic), _mm512_set1_ps(-1.5957691216057308f));
  return _mm512_div_ps(x, _mm512_add_ps(one, exp512(y2)));
}

// RMSNorm of one row: y = x / rms(x) * weight, float32 or bf16 out. In and out may be the same row.
inline void store(float* target, __m512 value) { _mm512_storeu_ps(target, value); }
inline void store(bf16* target, __m512 value) { store_bf16(target, value); }

template <class Out>
inline void rms_norm_row(const float* x, const float* weight, int size, float eps, Out* out) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < size; i += 16) {
    const __m512 value = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(size) + eps));
  for (int i = 0; i < size; i += 16)
    store(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
}

constexpr int GROUP = 32;               // outputs per packed group of a weight matrix
constexpr int TILE_ELEMENTS = 16 * 32;  // bf16 of 16 k-pairs times 16 outputs
