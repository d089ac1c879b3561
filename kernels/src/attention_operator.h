// Operator GroupQueryAttention of ONNX Runtime's contrib operators.
#pragma once
#include "attention.h"
#include "operators.h"

// Of the contrib operator's inputs the first nine, with `query` alone holding keys and values behind
// the queries, or each apart, or keys and values of no token, where all are in the cache already and
// nothing is written; causal. Attributes num_heads, kv_num_heads, scale, softcap (0: none),
// local_window_size (0: none) and sliding_window_cache; it rotates halves where it is given cosines
// and sines. Queries and new keys and values are float32, those of before and after `KEPT`.
template <ONNXTensorElementDataType KEPT>
class AttentionKernel {
 public:
  static constexpr const char *NAME = "GroupQueryAttention";
  static constexpr Slot INPUTS[] = {{FLOAT, false},    {FLOAT, true},     {FLOAT, true},
                                    {KEPT, false},     {KEPT, false},     {INTEGERS, false},
                                    {INTEGERS, false}, {ANY, true},       {ANY, true}};
  static constexpr Slot OUTPUTS[] = {{FLOAT, false}, {KEPT, true}, {KEPT, true}};

  OrtStatusPtr create(const OrtKernelInfo *info);
  OrtStatusPtr compute(OrtKernelContext *context) const;
  void destroy() {}

 private:
  OrtStatusPtr inputs(OrtKernelContext *context, Attention &a, Tensor &past_keys,
                      Tensor &past_values) const;
  OrtStatusPtr present(OrtKernelContext *context, Attention &a, const Tensor &past_keys,
                       const Tensor &past_values) const;
  OrtStatusPtr attend(OrtKernelContext *context, Attention &a) const;
  OrtStatusPtr attend_rolling(OrtKernelContext *context, Attention &a) const;
  size_t moved(size_t length, size_t rows) const;

  size_t heads_, kv_heads_, window_, rolling_;
  float scale_, cap_;
};
