// Products of rows of float32 with matrices of 4 and 8 bits, as MatMulNBits stores them.
//
// Inputs are rounded in each block of the matrix, to 15 bits (1 / 16256 of its largest) or to 8
// (1 / 127), and the products of a block are summed exactly, in integers; scales are applied and
// blocks added in float32. A row's result does not depend on how many rows are multiplied at once.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct Matrix {
  const uint8_t *codes;  // [n, blocks, block * bits / 8], the low half of a byte first
  const void *scales;    // [n, blocks], float16 or float32
  const uint8_t *zeros;  // [n, ceil(blocks * bits / 8)]; null: all blocks are around `middle`
  const uint8_t *middle; // [blocks], codes that stand for zero, where all rows have the same
  bool half_scales;
  bool coarse;           // inputs in 8 bits, else 15
  int bits;              // 4 or 8
  int block;             // 16, 32, 64, 128 or 256
  size_t k, n, blocks;   // blocks = ceil(k / block)

  // The most that an input becomes: in 15 bits two parts of 8 and 7 bits, or a word.
  float most() const { return coarse ? 127 : 127 * 128; }
};

// What the numbers of a block are multiplied by before they are rounded. Smaller ones than 1e-34
// count as 0: there are no floats that are large enough.
inline float levels_of(const Matrix &w, float limit) { return limit > 1e-34f ? w.most() / limit : 0; }

// The same work by different instructions.
struct MatMul {
  size_t (*rounded_bytes)(const Matrix &);  // of one row, a multiple of 64
  void (*round)(const Matrix &, const float *row, uint8_t *rounded);  // row: [k]
  // y[i, first:last] of rows i < m; y: [m, stride]
  void (*multiply)(const Matrix &, const uint8_t *rounded, size_t m, size_t first, size_t last,
                   float *y, size_t stride);
  // y = act(a) * b; act is SiLU, or GELU in its form with tanh
  void (*gate)(bool gelu, const float *a, const float *b, size_t count, float *y);
};

extern const MatMul matmul_avx2, matmul_avx512;
