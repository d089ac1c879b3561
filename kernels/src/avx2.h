// Vectors of float32 by AVX2: the words of `attention.inc` and `gate.inc`, which avx512.h has too.
// Their operators + - * / are those of the compilers.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define WITH_VECTORS __attribute__((target("avx2,f16c,fma")))
#define INLINE WITH_VECTORS inline __attribute__((always_inline))

namespace {
using Floats = __m256;
using Mask = __m256;      // all bits of a lane are set, or none
constexpr int LANES = 8;  // of 32 bits in a register

INLINE Floats zero() { return _mm256_setzero_ps(); }
INLINE Floats all(float x) { return _mm256_set1_ps(x); }

INLINE Floats load(const float *from) { return _mm256_loadu_ps(from); }
INLINE Floats load(const uint16_t *halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
}
INLINE void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
INLINE void store(uint16_t *halves, Floats x) {
  const __m128i rounded = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128((__m128i *)halves, rounded);
}

INLINE __m256i lanes() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }

// The first `count` lanes, of which there are 1 to LANES; the others are 0, and not written.
INLINE __m256i first_lanes(size_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lanes());
}
INLINE Floats load_first(size_t count, const float *from) {
  return _mm256_maskload_ps(from, first_lanes(count));
}
INLINE void store_first(size_t count, float *to, Floats x) {
  _mm256_maskstore_ps(to, first_lanes(count), x);
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats absolute(Floats x) { return _mm256_andnot_ps(all(-0.0f), x); }
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b if one is no number
INLINE Floats nearest(Floats x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// x * 2^n, with n from -126 to 127
INLINE Floats scaled(Floats x, Floats n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

INLINE Mask at_most(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
INLINE Floats pick(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }

// Whether first <= start + lane < last.
INLINE Mask between(size_t first, size_t last, size_t start) {
  const __m256i at = _mm256_add_epi32(lanes(), _mm256_set1_epi32((int)start));
  const __m256i early = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)first), at);
  const __m256i in_time = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)last), at);
  return _mm256_castsi256_ps(_mm256_andnot_si256(early, in_time));
}

INLINE float largest(Floats x) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// Four sums of all lanes; each is the same whatever the others are.
INLINE __m128 totals(Floats a, Floats b, Floats c, Floats d) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
INLINE float total(Floats x) { return _mm_cvtss_f32(totals(x, x, x, x)); }
}  // namespace
