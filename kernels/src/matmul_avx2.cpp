// Matrix products by AVX2: codes and inputs as words of 16 bits, multiplied and added in pairs.
#include "matmul.h"

#if defined(__x86_64__)
#include <string.h>

#include "avx2.h"
#include "gate.inc"

namespace {
constexpr int BYTES = 32;  // of a register, and of codes that are taken apart at once: a chunk

// How rounded inputs lie in memory: in groups of chunks, whose sums end in one register.
//
// A group has for each chunk a register for the first codes of its words, one for the second ones,
// and so on; then for each lane the factor of its block, and in the first lane of each block what
// the codes of zero take from its sum.
template <int BITS, int BLOCK>
struct Layout {
  static constexpr int PARTS = 16 / BITS;               // codes in a word
  static constexpr int CHUNK = BYTES * 8 / BITS;        // codes
  static constexpr int BLOCK_BYTES = BLOCK * BITS / 8;  // of codes
  static constexpr int CHUNKS = BLOCK_BYTES < 16 ? 2 : 4;
  static constexpr int GROUP = CHUNKS * CHUNK, GROUP_BYTES = CHUNKS * BYTES;  // of codes
  static constexpr int FACTORS = CHUNKS * PARTS * BYTES, ZEROS = FACTORS + BYTES;
  static constexpr int SIZE = ZEROS + BYTES;                 // bytes of a group of inputs
  static constexpr int PER = BLOCK < GROUP ? GROUP / BLOCK : 1;     // blocks of a group, or
  static constexpr int GROUPS = BLOCK < GROUP ? 1 : BLOCK / GROUP;  // groups of a block

  // Whether the sums of so many chunks are of several blocks, which go to lanes of their own.
  static constexpr bool apart(int chunks) { return chunks * BYTES > BLOCK_BYTES; }

  // The group's block that a lane has the sum of, or a part of it: see `joined`.
  static constexpr int block_of(int lane) {
    const int times = apart(CHUNKS) + (CHUNKS == 4 && apart(2)), within = 2 - times;
    const int part = lane % 4 >> within, place = lane % 4 & ((1 << within) - 1);
    return (part * (GROUP_BYTES >> times) + lane / 4 * 16 + (place << times) * 4) / BLOCK_BYTES;
  }
  static constexpr int first_of(int lane) {  // the same in a block's first lane, or -1
    for (int i = 0; i < lane; i++)
      if (block_of(i) == block_of(lane)) return -1;
    return block_of(lane);
  }
  INLINE static __m256i blocks() {
    return _mm256_setr_epi32(block_of(0), block_of(1), block_of(2), block_of(3),  //
                             block_of(4), block_of(5), block_of(6), block_of(7));
  }
  INLINE static __m256i firsts() {
    return _mm256_setr_epi32(first_of(0), first_of(1), first_of(2), first_of(3),  //
                             first_of(4), first_of(5), first_of(6), first_of(7));
  }
  INLINE static size_t groups(const Matrix &w) { return (w.blocks * BLOCK + GROUP - 1) / GROUP; }
};

// 8 numbers of a row, and zeros behind its end
INLINE Floats part_of(const float *row, size_t at, size_t end) {
  if (at + LANES <= end) return load(row + at);
  return at < end ? load_first(end - at, row + at) : zero();
}

// The largest of a block's absolute values; no number if one is none.
INLINE float limit_of(const Matrix &w, const float *row, size_t start) {
  __m256i most = _mm256_setzero_si256();  // the order of numbers >= 0 is that of their bits
  for (int i = 0; i < w.block; i += LANES)
    most = _mm256_max_epi32(most, _mm256_castps_si256(absolute(part_of(row, start + i, w.k))));
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
}

INLINE int sum_of(__m256i x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// 16 inputs, each to its register of a chunk; `to` is their place in the first one.
template <int PARTS>
INLINE void spread(__m256i words, uint8_t *to) {
  // The words of each half in the order 0 4 1 5 2 6 3 7, or 0 2 4 6 1 3 5 7.
  const __m128i order =
      PARTS == 4 ? _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
                 : _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  words = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  __m128i *at = (__m128i *)to;
  if (PARTS == 4) {
    const __m128i first = _mm_unpacklo_epi32(low, high), last = _mm_unpackhi_epi32(low, high);
    _mm_storel_epi64(at, first);
    _mm_storel_epi64(at + 2, _mm_unpackhi_epi64(first, first));
    _mm_storel_epi64(at + 4, last);
    _mm_storel_epi64(at + 6, _mm_unpackhi_epi64(last, last));
  } else {
    _mm_store_si128(at, _mm_unpacklo_epi64(low, high));
    _mm_store_si128(at + 2, _mm_unpackhi_epi64(low, high));
  }
}

template <int BITS, int BLOCK>
WITH_VECTORS size_t bytes_of(const Matrix &w) {
  return Layout<BITS, BLOCK>::groups(w) * Layout<BITS, BLOCK>::SIZE;
}

template <int BITS, int BLOCK>
WITH_VECTORS void round_by(const Matrix &w, const float *row, uint8_t *rounded) {
  using L = Layout<BITS, BLOCK>;
  const size_t end = L::groups(w) * L::GROUP;
  for (size_t start = 0, b = 0; start < end; start += BLOCK, b++) {
    const float limit = limit_of(w, row, start);
    const Floats levels = all(levels_of(w, limit));
    __m256i sum = _mm256_setzero_si256();
    for (size_t at = start; at < start + BLOCK; at += 2 * LANES) {
      const __m256i x = _mm256_cvtps_epi32(part_of(row, at, w.k) * levels);
      const __m256i y = _mm256_cvtps_epi32(part_of(row, at + LANES, w.k) * levels);
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(x, y));
      const size_t in = at % L::GROUP;
      uint8_t *chunk = rounded + at / L::GROUP * L::SIZE + in / L::CHUNK * L::PARTS * BYTES;
      spread<L::PARTS>(_mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xd8),
                       chunk + in % L::CHUNK / L::PARTS * 2);
    }
    int zeros = sum_of(sum);
    if (!w.zeros) zeros *= b < w.blocks ? -w.middle[b] : 0;
    const __m256i block = _mm256_set1_epi32((int)(b % L::PER));
    const __m256i mask = _mm256_cmpeq_epi32(L::blocks(), block);
    const __m256i first = _mm256_cmpeq_epi32(L::firsts(), block);
    __m256i taken = _mm256_and_si256(first, _mm256_set1_epi32(zeros));
    for (size_t i = 0; i < L::GROUPS; i++) {
      uint8_t *group = rounded + (start / L::GROUP + i) * L::SIZE;
      _mm256_maskstore_ps((float *)(group + L::FACTORS), mask, all(limit / w.most()));
      _mm256_maskstore_epi32((int *)(group + L::ZEROS), mask, taken);
      taken = _mm256_setzero_si256();
    }
  }
}

// The scales of a group's blocks, each in the lanes of its block.
template <bool HALF, int PER>
INLINE Floats scales_at(const void *scales, size_t at, __m256i blocks) {
  const uint16_t *halves = (const uint16_t *)scales + at;
  const float *floats = (const float *)scales + at;
  __m128 some = _mm_setzero_ps();
  if (PER == 8) return _mm256_permutevar8x32_ps(HALF ? load(halves) : load(floats), blocks);
  if (PER == 4)
    some = HALF ? _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)halves)) : _mm_loadu_ps(floats);
  if (PER == 2) {
    int32_t pair;
    memcpy(&pair, halves, sizeof pair);
    some = HALF ? _mm_cvtph_ps(_mm_cvtsi32_si128(pair))
                : _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)floats));
  }
  if (PER == 1) {
    some = HALF ? _mm_cvtph_ps(_mm_cvtsi32_si128(*halves)) : _mm_load_ss(floats);
    return _mm256_broadcastss_ps(some);
  }
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(some), blocks);
}

// Their codes of zero; `zeros` are those of one row, `at` is a multiple of PER.
template <int BITS, int PER>
INLINE __m256i zeros_at(const uint8_t *zeros, size_t at, __m256i blocks) {
  const uint8_t *from = zeros + at * BITS / 8;
  if (PER == 1) return _mm256_set1_epi32(BITS == 4 ? *from >> at % 2 * 4 & 15 : *from);
  uint64_t codes = 0;
  memcpy(&codes, from, PER * BITS / 8);
  if (BITS == 8) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)codes));
    return _mm256_permutevar8x32_epi32(wide, blocks);
  }
  const __m256i each = _mm256_set1_epi32((int)codes);
  const __m256i moved = _mm256_srlv_epi32(each, _mm256_slli_epi32(blocks, 2));
  return _mm256_and_si256(moved, _mm256_set1_epi32(15));
}

// R rows of the matrix by M rows of inputs.
template <int BITS, int BLOCK, bool HALF, bool ZEROS, int R, int M>
struct Tile {
  using L = Layout<BITS, BLOCK>;
  static constexpr int PARTS = L::PARTS, PER = L::PER;

  const Matrix &w;
  const size_t row, row_bytes, row_zeros, step;  // step: bytes of a row of rounded inputs
  const uint8_t *rounded;

  // Sums of products of a chunk.
  INLINE void chunk(__m256i codes, const uint8_t *inputs, __m256i (&sums)[M]) const {
    const __m256i mask = _mm256_set1_epi16((1 << BITS) - 1);
    __m256i parts[PARTS];
    parts[0] = _mm256_and_si256(codes, mask);
#pragma GCC unroll 4
    for (int p = 1; p < PARTS - 1; p++)
      parts[p] = _mm256_and_si256(_mm256_srli_epi16(codes, p * BITS), mask);
    parts[PARTS - 1] = _mm256_srli_epi16(codes, 16 - BITS);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const __m256i *in = (const __m256i *)(inputs + m * step);
      sums[m] = _mm256_madd_epi16(parts[0], in[0]);
#pragma GCC unroll 4
      for (int p = 1; p < PARTS; p++) {
        sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(parts[p], in[p]));
        // gcc would add them in another order, for which there are too few registers.
        __asm__("" : "+x"(sums[m]));
      }
    }
  }

  // Sums of products of COUNT chunks, of whose codes `left` bytes are there.
  template <bool WHOLE, int COUNT>
  INLINE void chunks(const uint8_t *codes, int left, const uint8_t *inputs,
                     __m256i (&sums)[M]) const {
    if constexpr (COUNT > 1) {
      constexpr int FIRST = COUNT / 2 * BYTES;
      __m256i more[M];
      chunks<WHOLE, COUNT / 2>(codes, left, inputs, sums);
      chunks<WHOLE, COUNT / 2>(codes + FIRST, left - FIRST, inputs + FIRST * PARTS, more);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
        sums[m] = L::apart(COUNT) ? _mm256_hadd_epi32(sums[m], more[m])
                                  : _mm256_add_epi32(sums[m], more[m]);
    } else if (WHOLE || left >= BYTES) {
      chunk(_mm256_loadu_si256((const __m256i *)codes), inputs, sums);
    } else if (left > 0) {
      chunk(_mm256_maskload_epi32((const int *)codes, first_lanes(left / 4)), inputs, sums);
    } else {
      for (int m = 0; m < M; m++) sums[m] = _mm256_setzero_si256();
    }
  }

  // A sum with what was found in a group of one row of inputs.
  INLINE Floats added(Floats sum, __m256i found, Floats scales, __m256i zeros,
                      const uint8_t *inputs) const {
    const __m256i taken = _mm256_load_si256((const __m256i *)(inputs + L::ZEROS));
    found = ZEROS ? _mm256_sub_epi32(found, _mm256_mullo_epi32(zeros, taken))
                  : _mm256_add_epi32(found, taken);
    const Floats factors = scales * load((const float *)(inputs + L::FACTORS));
    return multiply_add(_mm256_cvtepi32_ps(found), factors, sum);
  }

  INLINE void group(size_t g, Floats (&sums)[R][M]) const {
    const uint8_t *inputs = rounded + g * L::SIZE;
    const size_t block = g * PER / L::GROUPS;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint8_t *codes = w.codes + (row + r) * row_bytes + g * L::GROUP_BYTES;
      _mm_prefetch((const char *)codes + R * row_bytes, _MM_HINT_T0);
      _mm_prefetch((const char *)codes + R * row_bytes + 64, _MM_HINT_T0);
      __m256i found[M], zeros = _mm256_setzero_si256();
      chunks<true, L::CHUNKS>(codes, L::GROUP_BYTES, inputs, found);
      const size_t at = (row + r) * w.blocks + block;
      const Floats scales = scales_at<HALF, PER>(w.scales, at, L::blocks());
      if (ZEROS) zeros = zeros_at<BITS, PER>(w.zeros + (row + r) * row_zeros, block, L::blocks());
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
        sums[r][m] = added(sums[r][m], found[m], scales, zeros, inputs + m * step);
    }
  }

  // The last blocks, where they make no group: nothing is read behind them.
  INLINE void last_blocks(size_t g, Floats (&sums)[R][M]) const {
    const uint8_t *inputs = rounded + g * L::SIZE;
    const size_t block = g * PER, count = w.blocks - block;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const size_t at = (row + r) * w.blocks + block;
      float scales[8] = {};
      for (size_t i = 0; i < count; i++)
        scales[i] = HALF ? _cvtsh_ss(((const uint16_t *)w.scales)[at + i])
                         : ((const float *)w.scales)[at + i];
      uint8_t zeros[8] = {};
      for (size_t i = 0; ZEROS && i < (count * BITS + 7) / 8; i++)
        zeros[i] = w.zeros[(row + r) * row_zeros + block * BITS / 8 + i];
      __m256i found[M];
      const uint8_t *codes = w.codes + (row + r) * row_bytes + g * L::GROUP_BYTES;
      const int left = (int)(row_bytes - g * L::GROUP_BYTES);
      chunks<false, L::CHUNKS>(codes, left, inputs, found);
      const Floats of_blocks = scales_at<false, PER>(scales, 0, L::blocks());
      const __m256i zeros_of_blocks = zeros_at<BITS, PER>(zeros, 0, L::blocks());
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
        sums[r][m] = added(sums[r][m], found[m], of_blocks, zeros_of_blocks, inputs + m * step);
    }
  }

  INLINE void run(float *y, size_t stride) const {
    const size_t whole = row_bytes / L::GROUP_BYTES;
    Floats sums[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[r][m] = zero();
    for (size_t g = 0; g < whole; g++) group(g, sums);
    if (PER > 1 && row_bytes % L::GROUP_BYTES) last_blocks(whole, sums);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      float *to = y + m * stride + row;
      const __m128 found = totals(sums[0][m], sums[1 % R][m], sums[2 % R][m], sums[3 % R][m]);
      if (R == 4) _mm_storeu_ps(to, found);
      if (R == 2) _mm_storel_pi((__m64 *)to, found);
      if (R == 1) _mm_store_ss(to, found);
    }
  }
};

// The last rows of inputs and of the matrix go by fewer at once.
template <int BITS, int BLOCK, bool HALF, bool ZEROS>
struct Product {
  const Matrix &w;
  const size_t first, last, stride, step;

  template <int R, int M>
  WITH_VECTORS void strip(const uint8_t *rounded, size_t &row, float *y) const {
    const size_t row_bytes = w.blocks * BLOCK * BITS / 8, row_zeros = (w.blocks * BITS + 7) / 8;
    for (; row + R <= last; row += R)
      Tile<BITS, BLOCK, HALF, ZEROS, R, M>{w, row, row_bytes, row_zeros, step, rounded}
          .run(y, stride);
  }

  template <int R, int M>
  WITH_VECTORS size_t rows(const uint8_t *rounded, float *y) const {
    size_t row = first;
    strip<R, M>(rounded, row, y);
    for (int m = 0; m < M; m++) {
      size_t left = row;
      strip<1, 1>(rounded + m * step, left, y + m * stride);
    }
    return M;
  }

  WITH_VECTORS void run(const uint8_t *rounded, size_t m, float *y) const {
    for (size_t done; m; m -= done, rounded += done * step, y += done * stride)
      done = m >= 4   ? rows<2, 4>(rounded, y)
             : m >= 2 ? rows<2, 2>(rounded, y)
                      : rows<4, 1>(rounded, y);
  }
};

template <int BITS, int BLOCK, bool HALF>
WITH_VECTORS void multiply_of(const Matrix &w, const uint8_t *rounded, size_t m, size_t first,
                              size_t last, float *y, size_t stride) {
  const size_t step = bytes_of<BITS, BLOCK>(w);
  if (w.zeros)
    Product<BITS, BLOCK, HALF, true>{w, first, last, stride, step}.run(rounded, m, y);
  else
    Product<BITS, BLOCK, HALF, false>{w, first, last, stride, step}.run(rounded, m, y);
}

template <int BITS, int BLOCK>
void multiply_by(const Matrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last,
                 float *y, size_t stride) {
  auto of = w.half_scales ? multiply_of<BITS, BLOCK, true> : multiply_of<BITS, BLOCK, false>;
  of(w, rounded, m, first, last, y, stride);
}

template <int BITS, int BLOCK>
constexpr MatMul BY = {bytes_of<BITS, BLOCK>, round_by<BITS, BLOCK>, multiply_by<BITS, BLOCK>, gate};

template <int BITS>
const MatMul &by(int block) {
  switch (block) {
    case 16: return BY<BITS, 16>;
    case 32: return BY<BITS, 32>;
    case 64: return BY<BITS, 64>;
    case 128: return BY<BITS, 128>;
    default: return BY<BITS, 256>;
  }
}

const MatMul &of(const Matrix &w) { return w.bits == 4 ? by<4>(w.block) : by<8>(w.block); }

size_t rounded_bytes(const Matrix &w) { return of(w).rounded_bytes(w); }

void round(const Matrix &w, const float *row, uint8_t *rounded) { of(w).round(w, row, rounded); }

void multiply(const Matrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last,
              float *y, size_t stride) {
  of(w).multiply(w, rounded, m, first, last, y, stride);
}
}  // namespace

const MatMul matmul_avx2 = {rounded_bytes, round, multiply, gate};
#endif
