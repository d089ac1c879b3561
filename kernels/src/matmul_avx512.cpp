// Matrix products by AVX-512 and its dot products of bytes (VNNI).
#include "matmul.h"

#if defined(__x86_64__)
#include "avx512.h"
#include "gate.inc"

namespace {
constexpr int BYTES = 64;   // of codes that are multiplied at once: a chunk
// Codes are asked for ahead of their turn, into the second cache: the first has too few requests
// under way to keep up with the memory.
constexpr size_t AHEAD = 8192;
constexpr size_t RUN = 4;  // chunks of a row that follow each other, where one row is multiplied

constexpr int parts_of(int bits, bool coarse) { return (bits == 4 ? 2 : 1) * (coarse ? 1 : 2); }

// How a chunk of rounded inputs lies in memory: upper parts, lower parts, each with the numbers
// of even places and of odd ones apart if two codes are in a byte; then for each lane the
// block's factor, and in its first lane what the codes of zero take from its sum.
struct Layout {
  int parts, inputs, bytes;  // registers of numbers; inputs and bytes of a chunk

  INLINE explicit Layout(const Matrix &w)
      : parts(parts_of(w.bits, w.coarse)), inputs(BYTES * 8 / w.bits), bytes((parts + 2) * BYTES) {}
  INLINE size_t chunks(const Matrix &w) const {
    return (w.blocks * w.block + inputs - 1) / inputs;
  }
};

WITH_VECTORS size_t rounded_bytes(const Matrix &w) {
  Layout layout(w);
  return layout.chunks(w) * layout.bytes;
}

// 16 numbers of a row, and zeros behind its end
INLINE Floats part_of(const float *row, size_t at, size_t end) {
  if (at + LANES <= end) return load(row + at);
  return at < end ? load_first(end - at, row + at) : zero();
}

// The largest of a block's absolute values; no number if one is none.
INLINE float limit_of(const Matrix &w, const float *row, size_t start) {
  __m512i most = _mm512_setzero_si512();  // the order of numbers >= 0 is that of their bits
  for (int i = 0; i < w.block; i += LANES)
    most = _mm512_max_epi32(most, _mm512_castps_si512(absolute(part_of(row, start + i, w.k))));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
}

// 32 numbers as bytes, or 16 where a block has no more: in their order, or even and odd ones apart.
INLINE void put(uint8_t *to, int bits, bool pairs, __m512i a, __m512i b) {
  if (bits == 8) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(a));
    if (pairs) _mm_storeu_si128((__m128i *)to + 1, _mm512_cvtepi32_epi8(b));
    return;
  }
  const __mmask16 mask = pairs ? 0xffff : 0xff;
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  _mm512_mask_cvtepi32_storeu_epi8(to, mask, _mm512_permutex2var_epi32(a, evens, b));
  _mm512_mask_cvtepi32_storeu_epi8(to + BYTES, mask, _mm512_permutex2var_epi32(a, odds, b));
}

WITH_VECTORS void round(const Matrix &w, const float *row, uint8_t *rounded) {
  const Layout layout(w);
  const int lanes = w.block * w.bits / 32;  // of a block's sum
  const bool pairs = w.block > LANES;
  const __m512i half = _mm512_set1_epi32(64);
  const size_t end = layout.chunks(w) * layout.inputs;
  for (size_t start = 0, b = 0; start < end; start += w.block, b++) {
    const float limit = limit_of(w, row, start);
    const __m512 levels = _mm512_set1_ps(levels_of(w, limit));
    __m512i sum = _mm512_setzero_si512();
    for (size_t at = start; at < start + w.block; at += 2 * LANES) {
      __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(part_of(row, at, w.k), levels)), b = a;
      if (pairs) b = _mm512_cvtps_epi32(_mm512_mul_ps(part_of(row, at + LANES, w.k), levels));
      sum = _mm512_add_epi32(sum, pairs ? _mm512_add_epi32(a, b) : a);
      uint8_t *to = rounded + at / layout.inputs * layout.bytes + at % layout.inputs * w.bits / 8;
      if (w.coarse) {
        put(to, w.bits, pairs, a, b);
        continue;
      }
      const __m512i upper_a = _mm512_srai_epi32(_mm512_add_epi32(a, half), 7);
      const __m512i upper_b = _mm512_srai_epi32(_mm512_add_epi32(b, half), 7);
      put(to, w.bits, pairs, upper_a, upper_b);
      put(to + layout.parts / 2 * BYTES, w.bits, pairs,
          _mm512_sub_epi32(a, _mm512_slli_epi32(upper_a, 7)),
          _mm512_sub_epi32(b, _mm512_slli_epi32(upper_b, 7)));
    }
    int zeros = _mm512_reduce_add_epi32(sum);
    if (!w.zeros) zeros *= b < w.blocks ? -w.middle[b] : 0;
    for (size_t lane = b * lanes; lane < (b + 1) * lanes; lane += LANES) {
      const __mmask16 mask = lanes >= LANES ? 0xffff : (1u << lanes) - 1;
      uint8_t *to = rounded + lane / LANES * layout.bytes + layout.parts * BYTES + lane % LANES * 4;
      _mm512_mask_storeu_ps(to, mask, _mm512_set1_ps(limit / w.most()));
      const bool first = lane == b * lanes;
      _mm512_mask_storeu_epi32(to + BYTES, mask, _mm512_maskz_set1_epi32(first ? 1 : 0, zeros));
    }
  }
}

// The scales of a chunk's blocks, each in the lanes of its block: lane i has that of where[i].
template <int PER>
INLINE __m512 scales_of(const Matrix &w, size_t at, __m512i where, __mmask8 there) {
  const uint16_t *halves = (const uint16_t *)w.scales + at;
  const float *floats = (const float *)w.scales + at;
  const bool half = w.half_scales;
  if (PER == 1)
    return half ? _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(*halves)))
                : _mm512_set1_ps(*floats);
  if (PER == 8)
    return _mm512_permutexvar_ps(
        where, _mm512_castps256_ps512(half ? _mm256_cvtph_ps(_mm_maskz_loadu_epi16(there, halves))
                                           : _mm256_maskz_loadu_ps(there, floats)));
  return _mm512_permutexvar_ps(
      where, _mm512_castps128_ps512(half ? _mm_cvtph_ps(_mm_maskz_loadu_epi16(there, halves))
                                         : _mm_maskz_loadu_ps(there, floats)));
}

// The codes of zero of a chunk's blocks, in the lanes of their blocks.
template <int BITS, int PER>
INLINE __m512i zeros_of(const Matrix &w, size_t row, size_t first, __m512i where, __mmask8 there) {
  if (BITS == 8) {
    const uint8_t *at = w.zeros + row * w.blocks + first;
    if (PER == 1) return _mm512_set1_epi32(*at);
    return _mm512_permutexvar_epi32(where, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, at)));
  }
  const uint8_t *at = w.zeros + row * ((w.blocks + 1) / 2) + first / 2;
  if (PER == 1) return _mm512_set1_epi32(*at >> (first & 1) * 4 & 15);
  uint32_t word = *at;
  if (PER >= 4) word |= there & 4 ? at[1] << 8 : 0;
  if (PER == 8) word |= (there & 16 ? at[2] << 16 : 0) | (there & 64 ? (uint32_t)at[3] << 24 : 0);
  const __m512i moved = _mm512_srlv_epi32(_mm512_set1_epi32((int)word), _mm512_slli_epi32(where, 2));
  return _mm512_and_si512(moved, _mm512_set1_epi32(15));
}

// R rows of the matrix by M rows of inputs; a chunk has PER blocks, or a part of one (1).
template <int BITS, bool COARSE_INPUTS, int PER, bool ZEROS, int R, int M>
struct Tile {
  static constexpr int PARTS = parts_of(BITS, COARSE_INPUTS);

  const Matrix &w;
  const size_t row, row_bytes, step;  // step: bytes of a row of rounded inputs
  const uint8_t *rounded;
  const __m512i where;

  // A chunk of row r. Of the chunk's blocks those are `there` that the row has.
  INLINE void chunk(int r, size_t c, size_t first, __mmask64 bytes, __mmask8 there,
                    __m512 (&sums)[R][M]) const {
    const __m512i nibble = _mm512_set1_epi8(15);
    const uint8_t *inputs = rounded + c * (PARTS + 2) * BYTES;
    const uint8_t *codes = w.codes + (row + r) * row_bytes + c * BYTES;
    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T1);
    const __m512i both = bytes == ~0ull ? _mm512_loadu_si512(codes)
                                        : _mm512_maskz_loadu_epi8(bytes, codes);
    const __m512 scales = scales_of<PER>(w, (row + r) * w.blocks + first, where, there);
    __m512i zeros = _mm512_setzero_si512(), low = both, high = both;
    if (ZEROS) zeros = zeros_of<BITS, PER>(w, row + r, first, where, there);
    if (BITS == 4) {
      low = _mm512_and_si512(both, nibble);
      high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const __m512i *in = (const __m512i *)(inputs + m * step);
      __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, in[0]);
      if (BITS == 4) sum = _mm512_dpbusd_epi32(sum, high, in[1]);
      if (!COARSE_INPUTS) {
        sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 7), low, in[PARTS / 2]);
        if (BITS == 4) sum = _mm512_dpbusd_epi32(sum, high, in[3]);
      }
      sum = ZEROS ? _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, in[PARTS + 1]))
                  : _mm512_add_epi32(sum, in[PARTS + 1]);
      const __m512 factors = _mm512_mul_ps(scales, _mm512_load_ps((const float *)(in + PARTS)));
      sums[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factors, sums[r][m]);
    }
  }

  INLINE void run(float *y, size_t stride) const {
    const size_t whole = row_bytes / BYTES, rest = row_bytes % BYTES;
    const int per_block = PER == 1 ? w.block * BITS / 8 / BYTES : 1;  // chunks, where PER is 1
    __m512 sums[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
    auto block_of = [&](size_t c) { return PER == 1 ? c / per_block : c * PER; };
    constexpr __mmask8 all = (1 << PER) - 1;
    size_t c = 0;
    for (; M == 1 && c + RUN <= whole; c += RUN)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        for (size_t i = c; i < c + RUN; i++) chunk(r, i, block_of(i), ~0ull, all, sums);
    for (; c < whole; c++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) chunk(r, c, block_of(c), ~0ull, all, sums);
    if (rest) {
      const __mmask8 there = (1u << (w.blocks - whole * PER)) - 1;
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) chunk(r, whole, whole * PER, (1ull << rest) - 1, there, sums);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      float *to = y + m * stride + row;
      if (R == 4)
        _mm_storeu_ps(to, totals(sums[0][m], sums[1 % R][m], sums[2 % R][m], sums[3 % R][m]));
      else
        for (int r = 0; r < R; r++) {
          const __m512 none = _mm512_setzero_ps();
          to[r] = _mm_cvtss_f32(totals(sums[r][m], none, none, none));
        }
    }
  }
};

// The last rows of inputs and of the matrix go by fewer at once.
template <int BITS, bool COARSE_INPUTS, int PER, bool ZEROS>
struct Product {
  const Matrix &w;
  const size_t first, last, stride, step;
  const __m512i where;

  template <int R, int M>
  WITH_VECTORS void strip(const uint8_t *rounded, size_t &row, float *y) const {
    const size_t row_bytes = w.blocks * w.block * BITS / 8;
    for (; row + R <= last; row += R)
      Tile<BITS, COARSE_INPUTS, PER, ZEROS, R, M>{w, row, row_bytes, step, rounded, where}.run(y, stride);
  }

  template <int M>
  WITH_VECTORS size_t rows(const uint8_t *rounded, float *y) const {
    size_t row = first;
    strip<4, M>(rounded, row, y);
    strip<1, M>(rounded, row, y);
    return M;
  }

  WITH_VECTORS void run(const uint8_t *rounded, size_t m, float *y) const {
    for (size_t done; m; m -= done, rounded += done * step, y += done * stride)
      done = m >= 4 ? rows<4>(rounded, y) : m >= 2 ? rows<2>(rounded, y) : rows<1>(rounded, y);
  }
};

template <int BITS, bool COARSE_INPUTS, int PER>
WITH_VECTORS void multiply_by(const Matrix &w, const uint8_t *rounded, size_t m, size_t first,
                             size_t last, float *y, size_t stride) {
  const int lanes = w.block * BITS / 32;
  alignas(64) int32_t block_of[LANES];
  for (int i = 0; i < LANES; i++) block_of[i] = i / (lanes < LANES ? lanes : LANES);
  const __m512i where = _mm512_load_si512(block_of);
  const size_t step = rounded_bytes(w);
  if (w.zeros)
    Product<BITS, COARSE_INPUTS, PER, true>{w, first, last, stride, step, where}.run(rounded, m, y);
  else
    Product<BITS, COARSE_INPUTS, PER, false>{w, first, last, stride, step, where}.run(rounded, m, y);
}

template <int BITS, bool COARSE_INPUTS>
void multiply_of(const Matrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last,
                 float *y, size_t stride) {
  switch (BYTES * 8 / BITS / w.block) {
    case 8: return multiply_by<BITS, COARSE_INPUTS, 8>(w, rounded, m, first, last, y, stride);
    case 4: return multiply_by<BITS, COARSE_INPUTS, 4>(w, rounded, m, first, last, y, stride);
    case 2: return multiply_by<BITS, COARSE_INPUTS, 2>(w, rounded, m, first, last, y, stride);
    default: return multiply_by<BITS, COARSE_INPUTS, 1>(w, rounded, m, first, last, y, stride);
  }
}

void multiply(const Matrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last,
              float *y, size_t stride) {
  auto of = w.bits == 4 ? (w.coarse ? multiply_of<4, true> : multiply_of<4, false>)
                        : (w.coarse ? multiply_of<8, true> : multiply_of<8, false>);
  of(w, rounded, m, first, last, y, stride);
}
}  // namespace

const MatMul matmul_avx512 = {rounded_bytes, round, multiply, gate};
#endif
