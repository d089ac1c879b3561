// Attention by AVX-512.
#include "attention.h"

#if defined(__x86_64__)
#include "avx512.h"
#include <math.h>
#include <stdlib.h>

namespace {
constexpr size_t BLOCK = 64;    // positions that are looked at together
constexpr size_t SPLIT = 256;   // positions of a task, whose results are combined
constexpr size_t QUERIES = 4;   // at once
constexpr size_t STRIP = 16;    // tokens of a task

struct Span {
  size_t first, last;
};

INLINE size_t total(const Attention &a, size_t text) { return (size_t)a.last[text] + 1; }

INLINE size_t before(const Attention &a, size_t text) {
  return total(a, text) > a.tokens ? total(a, text) - a.tokens : 0;
}

// The positions that a token looks at.
INLINE Span seen(const Attention &a, size_t text, size_t token) {
  const size_t end = before(a, text) + token + 1;
  return {a.window && end > a.window ? end - a.window : 0, end};
}

INLINE size_t splits(const Attention &a) {
  size_t most = 0;
  for (size_t i = 0; i < a.batch; i++) most = total(a, i) > most ? total(a, i) : most;
  return (most + SPLIT - 1) / SPLIT;
}

// Of all texts together: strip i is of text i / of_text.
INLINE size_t of_text(const Attention &a) { return (a.tokens + STRIP - 1) / STRIP; }

template <bool HALF>
INLINE __m512 load(const void *from, size_t at) {
  if (HALF)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at)));
  return _mm512_loadu_ps((const float *)from + at);
}

INLINE float number(const void *from, size_t at, bool half) {
  return half ? _cvtsh_ss(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

// One head of a token, turned by its position.
INLINE void turn(const Attention &a, const float *from, size_t position, float factor, float *to) {
  const size_t half = a.rotary / 2, angles = position * half;
  for (size_t i = 0; i < half; i++) {
    const float cos = number(a.cos, angles + i, a.half_angles);
    const float sin = number(a.sin, angles + i, a.half_angles);
    const float x = from[i], y = from[i + half];
    to[i] = (x * cos - y * sin) * factor;
    to[i + half] = (y * cos + x * sin) * factor;
  }
  for (size_t i = a.rotary; i < a.size; i++) to[i] = from[i] * factor;
}

INLINE void put(const Attention &a, const float *from, void *cache, size_t at) {
  for (size_t i = 0; i < a.size; i += LANES) {
    const __m512 x = _mm512_loadu_ps(from + i);
    if (a.half)
      _mm256_storeu_si256((__m256i *)((uint16_t *)cache + at + i),
                          _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    else
      _mm512_storeu_ps((float *)cache + at + i, x);
  }
}

// A long run of tokens makes tasks enough: each looks at all positions then, and combines itself.
INLINE bool alone(const Attention &a) { return a.tokens > STRIP || splits(a) == 1; }

INLINE size_t part_floats(const Attention &a) { return a.size + LANES; }

INLINE size_t row_of(const Attention &a, size_t text, size_t head, size_t token) {
  return (text * a.heads + head) * a.tokens + token;
}

WITH_AVX512 size_t partial_floats(const Attention &a) {
  return alone(a) ? 0 : splits(a) * a.batch * a.heads * a.tokens * part_floats(a);
}

WITH_AVX512 size_t strips(const Attention &a) { return a.batch * of_text(a); }

WITH_AVX512 void prepare(const Attention &a, size_t task) {
  const size_t text = task / of_text(a), first = task % of_text(a) * STRIP;
  const size_t end = first + STRIP < a.tokens ? first + STRIP : a.tokens;
  float turned[512];
  for (size_t token = first; token < end; token++) {
    const size_t position = before(a, text) + token, at = text * a.tokens + token;
    for (size_t head = 0; a.keys && head < a.kv_heads; head++) {
      const size_t to = ((text * a.kv_heads + head) * a.capacity + position) * a.size;
      turn(a, a.keys + at * a.key_stride + head * a.size, position, 1, turned);
      put(a, turned, a.key_cache, to);
      put(a, a.values + at * a.value_stride + head * a.size, a.value_cache, to);
    }
    for (size_t head = 0; head < a.heads; head++)
      turn(a, a.queries + at * a.query_stride + head * a.size, position, a.scale,
           a.turned + row_of(a, text, head, token) * a.size);
  }
}

// cap * tanh(x / cap)
INLINE __m512 capped(__m512 x, float cap) {
  const __m512 one = _mm512_set1_ps(1), size = _mm512_abs_ps(_mm512_div_ps(x, _mm512_set1_ps(cap)));
  const __m512 e = exponential(_mm512_mul_ps(size, _mm512_set1_ps(-2)));
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 found = _mm512_mul_ps(t, _mm512_set1_ps(cap));
  return _mm512_mask_sub_ps(found, negative, _mm512_setzero_ps(), found);
}

// M queries of one head of keys and values, over some of its positions.
template <bool HALF, int M>
struct Look {
  const Attention &a;
  const void *keys, *values;    // of this text and head
  const float *queries[M];
  Span seen[M];
  float *out[M];                // [size], a sum that is not divided yet
  float most[M], weight[M];     // the largest score, and what the sum is to be divided by

  // Scores of 4 positions, of which all are in the cache.
  INLINE void score(size_t position, float (&scores)[M][BLOCK], size_t at) const {
    __m512 sums[M][4];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[m][j] = _mm512_setzero_ps();
    for (size_t i = 0; i < a.size; i += LANES) {
      __m512 key[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) key[j] = load<HALF>(keys, (position + j) * a.size + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const __m512 query = _mm512_loadu_ps(queries[m] + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[m][j] = _mm512_fmadd_ps(query, key[j], sums[m][j]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
      _mm_storeu_ps(scores[m] + at, totals(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
  }

  // Weights of a block's positions in place of their scores; returns what the sum so far shrinks by.
  INLINE float weigh(int m, size_t start, float (&scores)[BLOCK]) {
    __m512 parts[BLOCK / LANES], top = _mm512_set1_ps(-INFINITY);
    const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (size_t i = 0; i < BLOCK / LANES; i++) {
      const __m512i at = _mm512_add_epi32(place, _mm512_set1_epi32((int)(start + i * LANES)));
      const __mmask16 there = _mm512_cmp_epi32_mask(at, _mm512_set1_epi32((int)seen[m].first), _MM_CMPINT_NLT) &
                              _mm512_cmp_epi32_mask(at, _mm512_set1_epi32((int)seen[m].last), _MM_CMPINT_LT);
      __m512 x = _mm512_loadu_ps(scores + i * LANES);
      if (a.cap > 0) x = capped(x, a.cap);
      parts[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, x);
      top = _mm512_max_ps(top, parts[i]);
    }
    const float before = most[m], now = _mm512_reduce_max_ps(top);
    if (now > before) most[m] = now;
    if (most[m] == -INFINITY) {
      for (size_t i = 0; i < BLOCK; i++) scores[i] = 0;
      return 1;
    }
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (size_t i = 0; i < BLOCK / LANES; i++) {
      const __m512 p = exponential(_mm512_sub_ps(parts[i], _mm512_set1_ps(most[m])));
      _mm512_storeu_ps(scores + i * LANES, p);
      sum = _mm512_add_ps(sum, p);
    }
    const float shrunk = before == most[m] ? 1 : expf(before - most[m]);
    weight[m] = weight[m] * shrunk + _mm512_reduce_add_ps(sum);
    return shrunk;
  }

  template <int W>
  INLINE void gather(size_t start, size_t end, size_t i, const float (&weights)[M][BLOCK], const float (&shrunk)[M]) {
    __m512 sums[M][W];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int k = 0; k < W; k++)
        sums[m][k] = _mm512_mul_ps(_mm512_loadu_ps(out[m] + i + k * LANES), _mm512_set1_ps(shrunk[m]));
    for (size_t j = start; j < end; j++) {
      __m512 value[W];
#pragma GCC unroll 4
      for (int k = 0; k < W; k++) value[k] = load<HALF>(values, j * a.size + i + k * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const __m512 p = _mm512_set1_ps(weights[m][j % BLOCK]);
#pragma GCC unroll 4
        for (int k = 0; k < W; k++) sums[m][k] = _mm512_fmadd_ps(p, value[k], sums[m][k]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int k = 0; k < W; k++) _mm512_storeu_ps(out[m] + i + k * LANES, sums[m][k]);
  }

  // All blocks from `span.first`, a multiple of BLOCK, to `span.last`.
  INLINE void run(Span span) {
    for (size_t start = span.first; start < span.last; start += BLOCK) {
      const size_t end = start + BLOCK < span.last ? start + BLOCK : span.last;
      float scores[M][BLOCK], shrunk[M];
      size_t j = start;
      for (; j + 4 <= a.capacity && j < end; j += 4) score(j, scores, j - start);
      for (; j < end; j++) {  // the last rows of the cache
        for (int m = 0; m < M; m++) {
          __m512 sum = _mm512_setzero_ps();
          for (size_t i = 0; i < a.size; i += LANES)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(queries[m] + i), load<HALF>(keys, j * a.size + i), sum);
          const __m512 none = _mm512_setzero_ps();
          scores[m][j - start] = _mm_cvtss_f32(totals(sum, none, none, none));
        }
      }
      for (int m = 0; m < M; m++) shrunk[m] = weigh(m, start, scores[m]);
      size_t i = 0;
      for (; i + 4 * LANES <= a.size; i += 4 * LANES) gather<4>(start, end, i, scores, shrunk);
      for (; i < a.size; i += LANES) gather<1>(start, end, i, scores, shrunk);
    }
  }
};

// What one query found in each split: sums that are not divided yet, the largest score, the weight.
struct Parts {
  float *first;
  size_t count, step;  // floats from one split's to the next

  INLINE float *of(size_t split) const { return first + split * step; }

  INLINE void combine(const Attention &a, float *out) const {
    float most = -INFINITY, weight = 0;
    for (size_t s = 0; s < count; s++) most = fmaxf(most, of(s)[a.size]);
    for (size_t i = 0; i < a.size; i += LANES) _mm512_storeu_ps(out + i, _mm512_setzero_ps());
    for (size_t s = 0; s < count; s++) {
      const float *part = of(s);
      if (part[a.size] == -INFINITY) continue;  // it looked at nothing there
      const float factor = expf(part[a.size] - most);
      weight += factor * part[a.size + 1];
      for (size_t i = 0; i < a.size; i += LANES) {
        const __m512 sum = _mm512_loadu_ps(out + i), more = _mm512_loadu_ps(part + i);
        _mm512_storeu_ps(out + i, _mm512_fmadd_ps(_mm512_set1_ps(factor), more, sum));
      }
    }
    const __m512 divided = _mm512_set1_ps(1 / weight);
    for (size_t i = 0; i < a.size; i += LANES)
      _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(out + i), divided));
  }
};

INLINE Parts parts_of(const Attention &a, size_t row) {
  const size_t step = a.batch * a.heads * a.tokens * part_floats(a);
  return {a.partial + row * part_floats(a), splits(a), step};
}

// A task's queries: all heads that share keys, of a strip of tokens.
struct Task {
  const Attention &a;
  size_t text, head, first, count, split;  // head: of keys and values
  float *room;                             // for the parts of QUERIES, where it combines itself

  INLINE explicit Task(const Attention &a, size_t task) : a(a), room(nullptr) {
    const size_t n = alone(a) ? 1 : splits(a), parts = of_text(a);
    split = task % n;
    first = task / n % parts * STRIP;
    head = task / n / parts % a.kv_heads;
    text = task / n / parts / a.kv_heads;
    count = (first + STRIP < a.tokens ? STRIP : a.tokens - first) * (a.heads / a.kv_heads);
  }

  template <bool HALF, int M>
  INLINE void look(size_t query) const {
    const size_t group = a.heads / a.kv_heads, bytes = HALF ? 2 : 4;
    const size_t base = (text * a.kv_heads + head) * a.capacity * a.size * bytes;
    Look<HALF, M> look{a, (const char *)a.key_cache + base, (const char *)a.value_cache + base,
                       {}, {}, {}, {}, {}};
    Parts parts[M];
    float *out[M];
    Span span = {SIZE_MAX, 0};
    for (int m = 0; m < M; m++) {
      const size_t token = first + (query + m) / group, at = head * group + (query + m) % group;
      const size_t row = row_of(a, text, at, token);
      look.queries[m] = a.turned + row * a.size;
      look.seen[m] = seen(a, text, token);
      out[m] = a.out + ((text * a.tokens + token) * a.heads + at) * a.size;
      parts[m] = room ? Parts{room + m * part_floats(a), splits(a), M * part_floats(a)}
                      : parts_of(a, row);
      if (look.seen[m].first < span.first) span.first = look.seen[m].first;
      if (look.seen[m].last > span.last) span.last = look.seen[m].last;
    }
    span.first = span.first / BLOCK * BLOCK;
    for (size_t s = room ? 0 : split; s < (room ? splits(a) : split + 1); s++) {
      for (int m = 0; m < M; m++) {
        look.out[m] = parts[m].of(s);
        for (size_t i = 0; i < a.size; i += LANES)
          _mm512_storeu_ps(look.out[m] + i, _mm512_setzero_ps());
        look.most[m] = -INFINITY;
        look.weight[m] = 0;
      }
      look.run({span.first > s * SPLIT ? span.first : s * SPLIT,
                span.last < (s + 1) * SPLIT ? span.last : (s + 1) * SPLIT});
      for (int m = 0; m < M; m++) {
        look.out[m][a.size] = look.most[m];
        look.out[m][a.size + 1] = look.weight[m];
      }
    }
    for (int m = 0; room && m < M; m++) parts[m].combine(a, out[m]);
  }

  template <bool HALF>
  WITH_AVX512 void run() const {
    size_t query = 0;
    for (; query + QUERIES <= count; query += QUERIES) look<HALF, QUERIES>(query);
    if (count - query == 3) look<HALF, 3>(query);
    if (count - query == 2) look<HALF, 2>(query);
    if (count - query == 1) look<HALF, 1>(query);
  }
};

WITH_AVX512 size_t tasks(const Attention &a) {
  return strips(a) * a.kv_heads * (alone(a) ? 1 : splits(a));
}

WITH_AVX512 void run(const Attention &a, size_t index) {
  Task task(a, index);
  if (alone(a)) task.room = (float *)malloc(QUERIES * splits(a) * part_floats(a) * sizeof(float));
  a.half ? task.run<true>() : task.run<false>();
  free(task.room);
}

WITH_AVX512 void combine(const Attention &a, size_t task) {
  if (alone(a)) return;
  const size_t text = task / of_text(a), first = task % of_text(a) * STRIP;
  const size_t end = first + STRIP < a.tokens ? first + STRIP : a.tokens;
  for (size_t token = first; token < end; token++)
    for (size_t head = 0; head < a.heads; head++)
      parts_of(a, row_of(a, text, head, token))
          .combine(a, a.out + ((text * a.tokens + token) * a.heads + head) * a.size);
}
}  // namespace

const Attend attend_avx512 = {strips, tasks, partial_floats, prepare, run, combine};
#endif
