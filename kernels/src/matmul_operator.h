// Operator MatMulNBits of ONNX Runtime's contrib operators, and what may stand around it.
#pragma once
#include "matmul.h"
#include "operators.h"

// y = x W^T with W of N rows of K numbers of few bits; float32, scales float16 or float32.
//
// Of the contrib operator's inputs A, B, scales and zero_points, with its attributes K, N, bits and
// block_size; and besides
//   input_bits     15, or 8 as accuracy_level 4 of the contrib operator
//   group, copies  behind the inputs that are given come `copies` times the sums of each `group` of
//                  them, if group is not 0: K is how many there are with those
//   gate           0: none; else y = act(a) * b of the halves a, b of the outputs; act is SiLU (1)
//                  or GELU in its form with tanh (2)
class MatMulKernel {
 public:
  static constexpr const char *NAME = "MatMulNBits";
  static constexpr Slot INPUTS[] = {{FLOAT, false}, {BYTES, false}, {ANY, false}, {BYTES, true}};
  static constexpr Slot OUTPUTS[] = {{FLOAT, false}};

  OrtStatusPtr create(const OrtKernelInfo *info);
  OrtStatusPtr compute(OrtKernelContext *context) const;
  void destroy() { free(middle_); }

 private:
  OrtStatusPtr matrix(const Tensor &codes, const Tensor &scales, const Tensor &zeros,
                      Matrix &w) const;
  OrtStatusPtr given_matrix(OrtKernelContext *context, Matrix &w) const;
  OrtStatusPtr round(OrtKernelContext *context, const Matrix &w, const Tensor &x,
                     uint8_t *rounded) const;
  void look_at_zeros(const uint8_t *zeros);
  size_t blocks() const { return (k_ + block_ - 1) / block_; }
  size_t given() const;

  size_t k_, n_, bits_, block_, input_bits_, group_, copies_, gate_;
  uint8_t *middle_;  // [blocks]
  bool same_zeros_;  // whether `middle_` says all that the zero points say
  Matrix fixed_;     // codes are null unless all of it is constant
};
