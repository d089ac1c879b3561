#include "attention_operator.h"

#include <string.h>

#include "kernels.h"

namespace {
constexpr size_t LARGEST_HEAD = 512, STEP = 16;

OrtStatusPtr checked(const Attention &a, const Tensor &lengths, const Tensor &cos) {
  if (lengths.count != a.batch) return refused("GroupQueryAttention: seqlens_k has another size");
  for (size_t i = 0; i < a.batch; i++) {
    if (a.last[i] < 0) return refused("GroupQueryAttention: seqlens_k has a negative length");
    // Where a text has fewer tokens than the longest beside it, what fills it up takes room too.
    const size_t length = (size_t)a.last[i] + 1, filled = length < a.tokens ? a.tokens : length;
    if (filled > a.capacity)
      return refused("GroupQueryAttention: a text is longer than keys and values have room for");
    if (cos.data && filled > cos.size(0))
      return refused("GroupQueryAttention: a text is longer than there are angles");
  }
  return nullptr;
}
}  // namespace

template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::create(const OrtKernelInfo *info) {
  RETURN_IF_FAILED(attribute(info, "num_heads", heads_));
  RETURN_IF_FAILED(attribute(info, "kv_num_heads", kv_heads_));
  RETURN_IF_FAILED(attribute(info, "local_window_size", window_));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_float(info, "scale", &scale_));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_float(info, "softcap", &cap_));
  if (!kv_heads_ || !heads_ || heads_ % kv_heads_)
    return refused("GroupQueryAttention: kv_num_heads does not divide num_heads");
  return nullptr;
}

template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::inputs(OrtKernelContext *context, Attention &a,
                                           Tensor &past_keys, Tensor &past_values) const {
  Tensor query, key, value, lengths, cos, sin;
  RETURN_IF_FAILED(read_input(context, 0, query));
  RETURN_IF_FAILED(read_input(context, 1, key));
  RETURN_IF_FAILED(read_input(context, 2, value));
  RETURN_IF_FAILED(read_input(context, 3, past_keys));
  RETURN_IF_FAILED(read_input(context, 4, past_values));
  RETURN_IF_FAILED(read_input(context, 5, lengths));
  RETURN_IF_FAILED(read_input(context, 7, cos));
  RETURN_IF_FAILED(read_input(context, 8, sin));
  if (query.axes != 3 || past_keys.axes != 4 || past_values.axes != 4)
    return refused("GroupQueryAttention: queries, keys or values have other axes");
  a = {};
  a.heads = heads_, a.kv_heads = kv_heads_, a.window = window_, a.scale = scale_, a.cap = cap_;
  a.batch = query.size(0), a.tokens = query.size(1);
  a.capacity = past_keys.size(2), a.size = past_keys.size(3);
  for (size_t i = 0; i < 4; i++)
    if (past_values.sizes[i] != past_keys.sizes[i])
      return refused("GroupQueryAttention: past keys and values have different sizes");
  if (!a.size || a.size % STEP || a.size > LARGEST_HEAD)
    return refused("GroupQueryAttention: heads have 16 to 512 numbers, a multiple of 16");
  const size_t own = heads_ * a.size, kept = kv_heads_ * a.size;
  const bool packed = !key.data && !value.data;
  if (past_keys.size(0) != a.batch || past_keys.size(1) != kv_heads_ ||
      query.last() != (packed ? own + 2 * kept : own) ||
      (!packed && (key.count != a.batch * a.tokens * kept || value.count != key.count)))
    return refused("GroupQueryAttention: queries, keys or values have another size");
  a.queries = (const float *)query.data;
  a.keys = packed ? a.queries + own : (const float *)key.data;
  a.values = packed ? a.keys + kept : (const float *)value.data;
  a.query_stride = query.last();
  a.key_stride = a.value_stride = packed ? query.last() : kept;
  a.half = KEPT == HALF;
  a.last = (const int32_t *)lengths.data;
  if (cos.data) {
    if (!sin.data || cos.axes != 2 || sin.count != cos.count || sin.type != cos.type ||
        2 * cos.last() > a.size || (cos.type != HALF && cos.type != FLOAT))
      return refused("GroupQueryAttention: cosines or sines have another size or type");
    a.cos = cos.data, a.sin = sin.data;
    a.rotary = 2 * cos.last();
    a.half_angles = cos.type == HALF;
  }
  return checked(a, lengths, cos);
}

template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::compute(OrtKernelContext *context) const {
  Attention a;
  Tensor past_keys, past_values;
  RETURN_IF_FAILED(inputs(context, a, past_keys, past_values));
  const int64_t sizes[] = {(int64_t)a.batch, (int64_t)a.tokens, (int64_t)(a.heads * a.size)};
  void *out;
  RETURN_IF_FAILED(output(context, 0, sizes, 3, &out));
  RETURN_IF_FAILED(output(context, 1, past_keys.sizes, 4, &a.key_cache));
  RETURN_IF_FAILED(output(context, 2, past_values.sizes, 4, &a.value_cache));
  a.out = (float *)out;
  // Past and present are the same memory where the caller wants it so.
  const size_t bytes = past_keys.count * (a.half ? 2 : 4);
  if (a.key_cache != past_keys.data) memcpy(a.key_cache, past_keys.data, bytes);
  if (a.value_cache != past_values.data) memcpy(a.value_cache, past_values.data, bytes);
  if (!a.batch || !a.tokens) return nullptr;
  const Attend &attend = kernels->attend;
  Room turned, partial;
  if (!turned.take(a.batch * a.heads * a.tokens * a.size * sizeof(float)) ||
      !partial.take(attend.partial_floats(a) * sizeof(float)))
    return no_memory();
  a.turned = turned.as<float>(), a.partial = partial.as<float>();
  auto prepare = [&](size_t task) { attend.prepare(a, task); };
  auto run = [&](size_t task) { attend.run(a, task); };
  auto combine = [&](size_t task) { attend.combine(a, task); };
  RETURN_IF_FAILED(in_parallel(context, prepare, attend.strips(a)));
  RETURN_IF_FAILED(in_parallel(context, run, attend.tasks(a)));
  return attend.partial_floats(a) ? in_parallel(context, combine, attend.strips(a)) : nullptr;
}

template class AttentionKernel<HALF>;
template class AttentionKernel<FLOAT>;
