// Operator GroupQueryAttention of ONNX Runtime's contrib operators.
#pragma once
#include "attention.h"
#include "operators.h"

// Of the contrib operator's inputs the first nine, with `query` alone holding keys and values behind
// the queries, or each apart; causal. Attributes num_heads, kv_num_heads, scale, softcap (0: none)
// and local_window_size (0: none); it rotates halves where it is given cosines and sines. Queries and
// new keys and values are float32, those of before and after `KEPT`.
template <ONNXTensorElementDataType KEPT>
class AttentionKernel {
 public:
  static constexpr const char *NAME = "GroupQueryAttention";
  static constexpr Slot INPUTS[] = {{FLOAT, false}, {FLOAT, true},     {FLOAT, true},
                                    {KEPT, false},  {KEPT, false},     {INTEGERS, false},
                                    {INTEGERS, false}, {ANY, true},    {ANY, true}};
  static constexpr Slot OUTPUTS[] = {{FLOAT, false}, {KEPT, false}, {KEPT, false}};

  OrtStatusPtr create(const OrtKernelInfo *info);
  OrtStatusPtr compute(OrtKernelContext *context) const;
  void destroy() {}

 private:
  OrtStatusPtr inputs(OrtKernelContext *context, Attention &a, Tensor &past_keys,
                      Tensor &past_values) const;

  size_t heads_, kv_heads_, window_;
  float scale_, cap_;
};
