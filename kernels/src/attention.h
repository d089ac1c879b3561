// Attention of several query heads over each head of keys and values, as GroupQueryAttention
// defines it: new keys and values are put behind those of before, then looked at.
//
// Computed in float32 in blocks of positions that begin at multiples of their size, so that a
// query's result does not depend on the queries, texts and threads beside it.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct Attention {
  size_t heads, kv_heads, size;  // size: of a head, a multiple of 16
  size_t rotary;                 // first numbers of a head that turn with the position, or 0
  float scale, cap;              // cap: 0 for none
  size_t window;                 // positions that a query looks at with its own, 0 for all
  size_t batch, tokens, capacity;                   // capacity: rows of a cache
  const float *queries, *keys, *values;             // [batch, tokens, heads or kv_heads, size];
                                                    // no keys, values: all are there already
  size_t query_stride, key_stride, value_stride;    // floats from one token to the next
  void *key_cache, *value_cache;                    // [batch, kv_heads, capacity, size]
  bool half;                                        // whether these are float16, or float32
  const int32_t *last;                              // [batch], the last position of each text
  const size_t *first;                              // [batch], the position of row 0
  const void *cos, *sin;                            // [positions, rotary / 2]
  bool half_angles;
  float *turned;                                    // room for [batch, heads, tokens, size]
  float *partial;                                   // room for `partial_floats`
  float *out;                                       // [batch, tokens, heads, size]
};

// The same work by different instructions. Tasks of one step may run at once, steps follow.
struct Attend {
  size_t (*strips)(const Attention &);  // of tokens: tasks of `prepare` and of `combine`
  size_t (*tasks)(const Attention &);   // of `run`
  size_t (*partial_floats)(const Attention &);
  void (*prepare)(const Attention &, size_t task);  // append keys and values, turn queries
  void (*run)(const Attention &, size_t task);      // some queries, all or some positions
  void (*combine)(const Attention &, size_t task);  // what was found in several parts
};

extern const Attend attend_avx2, attend_avx512;
