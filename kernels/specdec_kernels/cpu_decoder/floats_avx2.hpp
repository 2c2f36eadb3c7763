// Sixteen float32 lanes in two AVX2 registers. Same interface as floats_avx512.hpp.
#pragma once

struct Floats {
  __m256 low, high;
};
struct Mask {
  __m256 low, high;  // all bits of a lane, or none
};

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

// Lanes in [first, last).
inline Mask lanes_between(int first, int last) {
  const auto inside = [&](__m256i lanes) {
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes),
                                                   _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lanes)));
  };
  return {inside(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)), inside(_mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8))};
}
inline Floats select(Mask mask, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}

// A bit for each lane with more than limit.
inline unsigned lanes_above(Floats value, float limit) {
  const auto bits = [&](__m256 half) {
    return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(half, _mm256_set1_ps(limit), _CMP_GT_OQ)));
  };
  return bits(value.low) | bits(value.high) << 8;
}

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
inline void store(float* target, Floats value) {
  _mm256_storeu_ps(target, value.low);
  _mm256_storeu_ps(target + 8, value.high);
}
inline void store_first(float* target, Floats value, int count) {
  if (count >= 16) return store(target, value);
  const Mask mask = lanes_between(0, count);
  _mm256_maskstore_ps(target, _mm256_castps_si256(mask.low), value.low);
  _mm256_maskstore_ps(target + 8, _mm256_castps_si256(mask.high), value.high);
}

// to_bf16 of 8 lanes, each in the low half of its 32 bits.
inline __m256i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, is_nan);
}
inline void store(bf16* target, Floats value) {
  const __m256i packed = _mm256_packus_epi32(to_bf16(value.low), to_bf16(value.high));
  // Packing works within halves of a register: put the quarters back in order.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(packed, 0b11011000));
}

// The first and the second of each of 16 pairs.
inline Floats load_first(const bf16* pairs) {
  const auto* raw = reinterpret_cast<const __m256i*>(pairs);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(raw), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(raw + 1), 16))};
}
inline Floats load_second(const bf16* pairs) {
  const auto* raw = reinterpret_cast<const __m256i*>(pairs);
  const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(raw), mask)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(raw + 1), mask))};
}

inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// sum + a * b, in the register of sum: for the intrinsic, GCC writes the result over a or b as it pleases, and runs out
// of registers in inner loops.
inline __m256 add_product(__m256 sum, __m256 a, __m256 b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}
inline Floats add_product(Floats sum, Floats a, Floats b) {
  return {add_product(sum.low, a.low, b.low), add_product(sum.high, a.high, b.high)};
}
// Of a NaN and a number, max and min return b.
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

// Folds lanes by op(__m128, __m128) until one is left.
template <class Op>
inline float reduce(Floats value, Op&& op) {
  const auto halves = [&](__m256 v) { return op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
  __m128 four = op(halves(value.low), halves(value.high));
  four = op(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(op(four, _mm_shuffle_ps(four, four, 1)));
}
inline float reduce_add(Floats value) {
  return reduce(value, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float reduce_max(Floats value) {
  return reduce(value, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

inline Floats nearest(Floats value) {
  constexpr int MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(value.low, MODE), _mm256_round_ps(value.high, MODE)};
}
// value * 2^n for a whole n in [-252, 252]: in two steps, since 2^n itself may be out of range.
inline __m256 scale_by_power(__m256 value, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(value, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Floats scale_by_power(Floats value, Floats n) {
  return {scale_by_power(value.low, n.low), scale_by_power(value.high, n.high)};
}
