// Vectors of float32 by AVX-512: the words of `attention.inc` and `gate.inc`, which avx2.h has too.
// Their operators + - * / are those of the compilers.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define WITH_VECTORS \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,f16c,fma")))
#define INLINE WITH_VECTORS inline __attribute__((always_inline))

namespace {
using Floats = __m512;
using Mask = __mmask16;
constexpr int LANES = 16;  // of 32 bits in a register

INLINE Floats zero() { return _mm512_setzero_ps(); }
INLINE Floats all(float x) { return _mm512_set1_ps(x); }

INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE Floats load(const uint16_t *halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}
INLINE void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE void store(uint16_t *halves, Floats x) {
  const __m256i rounded = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256((__m256i *)halves, rounded);
}

// The first `count` lanes, of which there are 1 to LANES; the others are 0, and not written.
INLINE Mask first_lanes(size_t count) { return (Mask)(0xffffu >> (LANES - count)); }
INLINE Floats load_first(size_t count, const float *from) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
INLINE void store_first(size_t count, float *to, Floats x) {
  _mm512_mask_storeu_ps(to, first_lanes(count), x);
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats absolute(Floats x) { return _mm512_abs_ps(x); }
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b if one is no number
INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }

// x * 2^n, with n from -126 to 127
INLINE Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

INLINE Mask at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE Floats pick(Mask mask, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, mask, yes); }

// Whether first <= start + lane < last.
INLINE Mask between(size_t first, size_t last, size_t start) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)start));
  return _mm512_cmp_epi32_mask(at, _mm512_set1_epi32((int)first), _MM_CMPINT_NLT) &
         _mm512_cmp_epi32_mask(at, _mm512_set1_epi32((int)last), _MM_CMPINT_LT);
}

INLINE float total(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }

// Four sums of all lanes; each is the same whatever the others are.
INLINE __m128 totals(Floats a, Floats b, Floats c, Floats d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
}  // namespace
