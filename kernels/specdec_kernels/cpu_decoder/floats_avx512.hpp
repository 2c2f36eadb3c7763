// Sixteen float32 lanes in one AVX-512 register. Same interface as floats_avx2.hpp.
#pragma once

using Floats = __m512;  // + - * / are the compiler's own
using Mask = __mmask16;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats set1(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* source) { return _mm512_loadu_ps(source); }
inline void store(float* target, Floats value) { _mm512_storeu_ps(target, value); }
inline void store(bf16* target, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(value));
}
inline void store_first(float* target, Floats value, int count) {
  _mm512_mask_storeu_ps(target, __mmask16((1u << std::min(count, 16)) - 1), value);
}

// The first and the second of each of 16 pairs.
inline Floats load_first(const bf16* pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
}
inline Floats load_second(const bf16* pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), _mm512_set1_epi32(int(0xffff0000u))));
}

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add_product(Floats sum, Floats a, Floats b) { return fma(a, b, sum); }
// Of a NaN and a number, max and min return b.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline float reduce_add(Floats value) { return _mm512_reduce_add_ps(value); }
inline float reduce_max(Floats value) { return _mm512_reduce_max_ps(value); }

inline Floats nearest(Floats value) {
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// value * 2^n for a whole n in [-252, 252].
inline Floats scale_by_power(Floats value, Floats n) { return _mm512_scalef_ps(value, n); }

// Lanes in [first, last).
inline Mask lanes_between(int first, int last) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32(first)) &
         _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32(last));
}
// A bit for each lane with more than limit.
inline unsigned lanes_above(Floats value, float limit) {
  return _mm512_cmp_ps_mask(value, _mm512_set1_ps(limit), _CMP_GT_OQ);
}
inline Floats select(Mask mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }
