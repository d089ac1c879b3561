#if defined(__x86_64__)

#include "matmul.h"
#include <immintrin.h>
#include <string.h>

#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma"
#define TARGET __attribute__((target(AVX512)))

namespace {
constexpr size_t LANES = 16;
constexpr int CHUNK = 64;  // bytes of codes that are multiplied at once

inline size_t per_chunk(const QuantisedMatrix &w) { return CHUNK * 8 / w.bits; }
inline size_t chunks(const QuantisedMatrix &w) {
  return (w.blocks * w.block + per_chunk(w) - 1) / per_chunk(w);
}
inline size_t chunk_bytes(const QuantisedMatrix &w) { return (w.bits == 4 ? 4 : 2) * CHUNK + 8 * LANES; }

// which scale of a chunk each lane takes
TARGET inline __m512i lane_scales(const QuantisedMatrix &w) {
  int lanes = w.block * w.bits / 32;  // a block's int32 lanes
  alignas(64) int32_t at[LANES];
  for (int i = 0; i < (int)LANES; i++) at[i] = lanes >= 16 ? 0 : i / lanes;
  return _mm512_load_si512(at);
}

// 16 numbers of a row of k, zeros behind it
TARGET inline __m512 part_of(const float *x, size_t i, size_t k) {
  if (i + LANES <= k) return _mm512_loadu_ps(x + i);
  return i < k ? _mm512_maskz_loadu_ps((1u << (k - i)) - 1, x + i) : _mm512_setzero_ps();
}
}  // namespace

size_t rounded_bytes(const QuantisedMatrix &w) {
  return chunks(w) * chunk_bytes(w);
}

TARGET void round_row(const QuantisedMatrix &w, const float *x, uint8_t *out) {
  const size_t per = per_chunk(w), wide = chunk_bytes(w), half = CHUNK;
  const int parts = w.bits == 4 ? 4 : 2, lanes = w.block * w.bits / 32;
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const size_t end = chunks(w) * per;
  for (size_t start = 0, b = 0; start < end; start += w.block, b++) {
    __m512 most = _mm512_setzero_ps();
    for (size_t i = start; i < start + w.block; i += LANES)
      most = _mm512_max_ps(most, _mm512_abs_ps(part_of(x, i, w.k)));
    float limit = _mm512_reduce_max_ps(most);
    float scale = limit / 16256.0f, inverse = limit > 0 ? 16256.0f / limit : 0;
    __m512 factor = _mm512_set1_ps(inverse);
    __m512i total = _mm512_setzero_si512();
    for (size_t i = start; i < start + w.block; i += 2 * LANES) {
      uint8_t *c = out + i / per * wide;
      size_t in = i % per;
      bool two = w.block > (int)LANES;
      __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(part_of(x, i, w.k), factor));
      __m512i q1 = two ? _mm512_cvtps_epi32(_mm512_mul_ps(part_of(x, i + LANES, w.k), factor)) : _mm512_setzero_si512();
      total = _mm512_add_epi32(total, _mm512_add_epi32(q0, q1));
      __m512i h0 = _mm512_srai_epi32(_mm512_add_epi32(q0, _mm512_set1_epi32(64)), 7);
      __m512i h1 = _mm512_srai_epi32(_mm512_add_epi32(q1, _mm512_set1_epi32(64)), 7);
      __m512i l0 = _mm512_sub_epi32(q0, _mm512_slli_epi32(h0, 7));
      __m512i l1 = _mm512_sub_epi32(q1, _mm512_slli_epi32(h1, 7));
      if (w.bits == 4) {
        __mmask16 mask = two ? 0xffff : 0xff;
        uint8_t *at = c + in / 2;
        _mm512_mask_cvtepi32_storeu_epi8(at, mask, _mm512_permutex2var_epi32(h0, evens, h1));
        _mm512_mask_cvtepi32_storeu_epi8(at + half, mask, _mm512_permutex2var_epi32(h0, odds, h1));
        _mm512_mask_cvtepi32_storeu_epi8(at + 2 * half, mask, _mm512_permutex2var_epi32(l0, evens, l1));
        _mm512_mask_cvtepi32_storeu_epi8(at + 3 * half, mask, _mm512_permutex2var_epi32(l0, odds, l1));
      } else {
        _mm512_mask_cvtepi32_storeu_epi8(c + in, 0xffff, h0);
        _mm512_mask_cvtepi32_storeu_epi8(c + half + in, 0xffff, l0);
        if (two) {
          _mm512_mask_cvtepi32_storeu_epi8(c + in + LANES, 0xffff, h1);
          _mm512_mask_cvtepi32_storeu_epi8(c + half + in + LANES, 0xffff, l1);
        }
      }
    }
    for (size_t lane = b * lanes; lane < (b + 1) * lanes; lane += LANES) {
      float *at = (float *)(out + lane / LANES * wide + parts * CHUNK) + lane % LANES;
      __mmask16 mask = lanes >= (int)LANES ? 0xffff : (1u << lanes) - 1;
      _mm512_mask_storeu_ps(at, mask, _mm512_set1_ps(scale));
      float sum = lane == b * lanes ? scale * _mm512_reduce_add_epi32(total) : 0;
      _mm512_mask_storeu_ps(at + LANES, mask, _mm512_maskz_mov_ps(1, _mm512_set1_ps(sum)));
    }
  }
}

namespace {
// scales of one chunk, each in the lanes of its block
template <bool HALF, int PER>
TARGET inline __m512 scales_of(const void *scales, size_t at, __m512i where, __mmask8 mask) {
  __m128 v;
  if (PER == 1) {
    if (HALF) return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(((const uint16_t *)scales)[at])));
    return _mm512_set1_ps(((const float *)scales)[at]);
  }
  if (PER == 8) {
    __m256 u = HALF ? _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, (const uint16_t *)scales + at))
                    : _mm256_maskz_loadu_ps(mask, (const float *)scales + at);
    return _mm512_permutexvar_ps(where, _mm512_castps256_ps512(u));
  }
  v = HALF ? _mm_cvtph_ps(_mm_maskz_loadu_epi16(mask, (const uint16_t *)scales + at)) : _mm_maskz_loadu_ps(mask, (const float *)scales + at);
  return _mm512_permutexvar_ps(where, _mm512_castps128_ps512(v));
}

// a zero point per block in the lanes of its block; count is how many blocks the chunk has
template <int BITS, int PER>
TARGET inline __m512 zeros_of(const uint8_t *zeros, size_t blocks, size_t row, size_t first, __m512i shifts, __m512i where, __mmask8 mask) {
  if (BITS == 4) {
    const uint8_t *at = zeros + row * ((blocks + 1) / 2) + first / 2;
    if (PER == 1) return _mm512_set1_ps((float)(*at >> (first & 1) * 4 & 15));
    uint32_t word;
    if (PER == 2) word = *at;
    if (PER == 4) word = at[0] | (mask & 4 ? at[1] << 8 : 0);
    if (PER == 8) word = at[0] | (mask & 4 ? at[1] << 8 : 0) | (mask & 16 ? at[2] << 16 : 0) | (mask & 64 ? (uint32_t)at[3] << 24 : 0);
    __m512i z = _mm512_srlv_epi32(_mm512_set1_epi32((int)word), shifts);
    return _mm512_cvtepi32_ps(_mm512_and_si512(z, _mm512_set1_epi32(15)));
  }
  const uint8_t *at = zeros + row * blocks + first;
  if (PER == 1) return _mm512_set1_ps((float)*at);
  __m512i z = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at));
  return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(where, z));
}

TARGET inline float total(__m512 v) { return _mm512_reduce_add_ps(v); }

// four sums of 16 lanes each
TARGET inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 f = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  __m256 g = _mm256_add_ps(_mm512_castps512_ps256(f), _mm512_extractf32x8_ps(f, 1));
  return _mm_add_ps(_mm256_castps256_ps128(g), _mm256_extractf128_ps(g, 1));
}

enum Zeros { MIDDLE, EACH };

template <int BITS, bool HALF, int PER, Zeros Z, int R, int M>
TARGET void tile(const QuantisedMatrix &w, const uint8_t *rounded, size_t stride, size_t row, float *y, size_t ldy) {
  constexpr int PARTS = BITS == 4 ? 4 : 2;
  const size_t row_bytes = w.blocks * w.block * BITS / 8;
  const size_t whole = row_bytes / CHUNK, tail = row_bytes % CHUNK;
  const int lanes = w.block * BITS / 32;
  const size_t chunks_per = lanes > 16 ? lanes / 16 : 1;
  const __m512i where = lane_scales(w), shifts = _mm512_slli_epi32(where, 2);
  constexpr __mmask8 full = (1u << PER) - 1;
  __m512 acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = _mm512_setzero_ps();
  const __m512i nibble = _mm512_set1_epi8(15);
  const uint8_t *codes = w.codes + row * row_bytes;
  auto chunk = [&](size_t c, __mmask64 mask, __mmask8 smask) __attribute__((always_inline, target(AVX512))) {
    const size_t first = PER == 1 ? c / chunks_per : c * PER;
    const uint8_t *act = rounded + c * (PARTS * CHUNK + 8 * LANES);
_Pragma("GCC unroll 4")
    for (int r = 0; r < R; r++) {
      const uint8_t *p = codes + r * row_bytes + c * CHUNK;
      _mm_prefetch((const char *)p + R * row_bytes, _MM_HINT_T0);
      __m512i v = mask == ~0ull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p);
      __m512 s = scales_of<HALF, PER>(w.scales, (row + r) * w.blocks + first, where, smask);
      __m512 z;
      if (Z == EACH) z = _mm512_mul_ps(s, zeros_of<BITS, PER>(w.zeros, w.blocks, row + r, first, shifts, where, smask));
      __m512i low = v, high = v;
      if (BITS == 4) {
        low = _mm512_and_si512(v, nibble);
        high = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
      }
_Pragma("GCC unroll 4")
      for (int m = 0; m < M; m++) {
        const __m512i *q = (const __m512i *)(act + m * stride);
        __m512i sum = _mm512_setzero_si512();
        if (BITS == 4) {
          sum = _mm512_dpbusd_epi32(sum, low, q[0]);
          sum = _mm512_dpbusd_epi32(sum, high, q[1]);
          sum = _mm512_slli_epi32(sum, 7);
          sum = _mm512_dpbusd_epi32(sum, low, q[2]);
          sum = _mm512_dpbusd_epi32(sum, high, q[3]);
        } else {
          sum = _mm512_dpbusd_epi32(sum, v, q[0]);
          sum = _mm512_slli_epi32(sum, 7);
          sum = _mm512_dpbusd_epi32(sum, v, q[1]);
        }
        __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps((const float *)(q + PARTS)));
        __m512 t = _mm512_load_ps((const float *)(q + PARTS + 1));  // sums of activations, for zeros
        if (Z == EACH) {
          acc[r][m] = _mm512_fnmadd_ps(t, z, _mm512_fmadd_ps(f, s, acc[r][m]));
        } else {
          acc[r][m] = _mm512_fmadd_ps(_mm512_fnmadd_ps(t, _mm512_set1_ps(BITS == 4 ? 8.0f : 128.0f), f), s, acc[r][m]);
        }
      }
    }
  };
  for (size_t c = 0; c < whole; c++) {
    chunk(c, ~0ull, full);
  }
  if (tail) {
    size_t left = PER == 1 ? 1 : w.blocks - whole * PER;
    chunk(whole, (1ull << tail) - 1, (1u << left) - 1);
  }
  for (int m = 0; m < M; m++) {
    if (R == 4)
      _mm_storeu_ps(y + m * ldy + row, totals(acc[0][m], acc[1][m], acc[2 % R][m], acc[3 % R][m]));
    else
      for (int r = 0; r < R; r++) y[m * ldy + row + r] = total(acc[r][m]);
  }
}

template <int BITS, bool HALF, int PER, Zeros Z>
TARGET void few(const QuantisedMatrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last, float *y) {
  size_t stride = rounded_bytes(w);
  while (m) {
    size_t now = m >= 4 ? 4 : m >= 2 ? 2 : 1;
    size_t row = first;
    for (; row + 4 <= last; row += 4) {
      if (now == 1) tile<BITS, HALF, PER, Z, 4, 1>(w, rounded, stride, row, y, w.n);
      if (now == 2) tile<BITS, HALF, PER, Z, 4, 2>(w, rounded, stride, row, y, w.n);
      if (now == 4) tile<BITS, HALF, PER, Z, 4, 4>(w, rounded, stride, row, y, w.n);
    }
    for (; row < last; row++)
      for (size_t i = 0; i < now; i++)
        tile<BITS, HALF, PER, Z, 1, 1>(w, rounded + i * stride, stride, row, y + i * w.n, w.n);
    m -= now, rounded += now * stride, y += now * w.n;
  }
}

template <int BITS, bool HALF, Zeros Z>
void of_block(const QuantisedMatrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last, float *y) {
  switch (CHUNK * 8 / BITS / w.block) {
    case 8: return few<BITS, HALF, 8, Z>(w, rounded, m, first, last, y);
    case 4: return few<BITS, HALF, 4, Z>(w, rounded, m, first, last, y);
    case 2: return few<BITS, HALF, 2, Z>(w, rounded, m, first, last, y);
    default: return few<BITS, HALF, 1, Z>(w, rounded, m, first, last, y);
  }
}

template <int BITS, bool HALF>
void with_zeros(const QuantisedMatrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last, float *y) {
  w.zeros ? of_block<BITS, HALF, EACH>(w, rounded, m, first, last, y) : of_block<BITS, HALF, MIDDLE>(w, rounded, m, first, last, y);
}
}  // namespace

void rows_by_few(const QuantisedMatrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last, float *y) {
  if (w.bits == 4)
    w.half_scales ? with_zeros<4, true>(w, rounded, m, first, last, y) : with_zeros<4, false>(w, rounded, m, first, last, y);
  else
    w.half_scales ? with_zeros<8, true>(w, rounded, m, first, last, y) : with_zeros<8, false>(w, rounded, m, first, last, y);
}

#endif
