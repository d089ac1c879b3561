// Products of activations in float32 with weights of 4 and 8 bits in blocks along K.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct QuantisedMatrix {
  const uint8_t *codes;      // [N, blocks, block * bits / 8], low nibble first
  const void *scales;        // [N, blocks], float16 or float32
  const uint8_t *zeros;      // [N, ceil(blocks * bits / 8)], or null for the middle of the range
  bool half_scales;
  int bits;                  // 4 or 8
  int block;                 // 16, 32, 64, 128, 256
  size_t k, n, blocks;
};

size_t rounded_bytes(const QuantisedMatrix &w);
void round_row(const QuantisedMatrix &w, const float *x, uint8_t *out);
void rows_by_few(const QuantisedMatrix &w, const uint8_t *rounded, size_t m, size_t first, size_t last, float *y);
