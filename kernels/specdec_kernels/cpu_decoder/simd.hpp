// Helpers on 16 float32 lanes, by AVX-512 or AVX2: bf16 conversion, exp, activations, RMSNorm of one row.
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

#ifdef __AVX512F__
#include "floats_avx512.hpp"
#else
#include "floats_avx2.hpp"
#endif

// exp(x) to about 1 ulp: 2^n * p(r) with x = n ln2 + r, |r| <= ln2 / 2. Below -104 it is 0, above 89 infinite; NaN
// stays NaN.
inline Floats exp(Floats x) {
  x = max(set1(-104.0f), min(set1(89.0f), x));
  const Floats n = nearest(x * set1(1.44269504088896341f));
  Floats r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale_by_power(fma(r * r, p, r + set1(1.0f)), n);
}

enum Activation { SILU = 0, GELU_TANH = 1 };

inline Floats activate(Floats x, int kind) {
  const Floats one = set1(1.0f);
  if (kind == SILU) return x / (one + exp(zeros() - x));
  // 0.5 x (1 + tanh(y)) = x / (1 + exp(-2y)), y = sqrt(2/pi) (x + 0.044715 x^3).
  const Floats cubic = (x * x) * (x * set1(0.044715f));
  return x / (one + exp((x + cubic) * set1(-1.5957691216057308f)));
}

// RMSNorm of one row: y = x / rms(x) * weight, float32 or bf16 out. In and out may be the same row.
template <class Out>
inline void rms_norm_row(const float* x, const float* weight, int size, float eps, Out* out) {
  Floats sum = zeros();
  for (int i = 0; i < size; i += 16) sum = fma(load(x + i), load(x + i), sum);
  const Floats scale = set1(1.0f / std::sqrt(reduce_add(sum) / float(size) + eps));
  for (int i = 0; i < size; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
}

constexpr int GROUP = 32;               // outputs per packed group of a weight matrix
constexpr int TILE_ELEMENTS = 16 * 32;  // bf16 of 16 k-pairs times 16 outputs
