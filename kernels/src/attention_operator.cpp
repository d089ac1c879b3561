#include "attention_operator.h"

#include <string.h>

#include "kernels.h"

namespace {
constexpr size_t LARGEST_HEAD = 512, STEP = 16;

size_t length(const Attention &a, size_t text) { return (size_t)a.last[text] + 1; }

size_t before(const Attention &a, size_t text) {
  return length(a, text) > a.tokens ? length(a, text) - a.tokens : 0;
}

OrtStatusPtr checked(const Attention &a, const Tensor &lengths, const Tensor &cos, bool rolling) {
  if (lengths.count != a.batch) return refused("GroupQueryAttention: seqlens_k has another size");
  for (size_t i = 0; i < a.batch; i++) {
    if (a.last[i] < 0) return refused("GroupQueryAttention: seqlens_k has a negative length");
    // Where a text has fewer tokens than the longest beside it, what fills it up takes room too.
    const size_t filled = length(a, i) < a.tokens ? a.tokens : length(a, i);
    if (!rolling && filled > a.capacity)
      return refused("GroupQueryAttention: a text is longer than keys and values have room for");
    if (cos.given && filled > cos.size(0))
      return refused("GroupQueryAttention: a text is longer than there are angles");
  }
  return nullptr;
}

// Rows of every head of a text, from one cache to another, which have `from_rows` and `to_rows`.
void copy_rows(const Attention &a, size_t text, const void *from, size_t from_rows, size_t from_row,
               void *to, size_t to_rows, size_t to_row, size_t count) {
  const size_t row = a.size * (a.half ? 2 : 4);
  for (size_t head = text * a.kv_heads; head < (text + 1) * a.kv_heads; head++)
    memmove((char *)to + (head * to_rows + to_row) * row,
            (const char *)from + (head * from_rows + from_row) * row, count * row);
}
}  // namespace

template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::create(const OrtKernelInfo *info) {
  RETURN_IF_FAILED(attribute(info, "num_heads", heads_));
  RETURN_IF_FAILED(attribute(info, "kv_num_heads", kv_heads_));
  RETURN_IF_FAILED(attribute(info, "local_window_size", window_));
  RETURN_IF_FAILED(attribute(info, "sliding_window_cache", rolling_));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_float(info, "scale", &scale_));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_float(info, "softcap", &cap_));
  if (!kv_heads_ || !heads_ || heads_ % kv_heads_)
    return refused("GroupQueryAttention: kv_num_heads does not divide num_heads");
  if (rolling_ && !window_) return refused("GroupQueryAttention: a rolling cache has no window");
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
  const bool packed = !key.given && !value.given, none = key.given && !key.count && !value.count;
  if (past_keys.size(0) != a.batch || past_keys.size(1) != kv_heads_ ||
      query.last() != (packed ? own + 2 * kept : own) ||
      (!packed && !none && (key.count != a.batch * a.tokens * kept || value.count != key.count)))
    return refused("GroupQueryAttention: queries, keys or values have another size");
  if (rolling_ && (none || a.capacity < window_))
    return refused("GroupQueryAttention: a rolling cache is smaller than its window, or shared");
  a.queries = (const float *)query.data;
  a.query_stride = query.last();
  if (!none) {
    a.keys = packed ? a.queries + own : (const float *)key.data;
    a.values = packed ? a.keys + kept : (const float *)value.data;
    a.key_stride = a.value_stride = packed ? query.last() : kept;
  }
  a.half = KEPT == HALF;
  a.last = (const int32_t *)lengths.data;
  if (cos.given) {
    if (!sin.given || cos.axes != 2 || sin.count != cos.count || sin.type != cos.type ||
        2 * cos.last() > a.size || (cos.type != HALF && cos.type != FLOAT))
      return refused("GroupQueryAttention: cosines or sines have another size or type");
    a.cos = cos.data, a.sin = sin.data;
    a.rotary = 2 * cos.last();
    a.half_angles = cos.type == HALF;
  }
  return checked(a, lengths, cos, rolling_);
}

// Where keys and values are: in what was given, if none are new, else in the outputs.
template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::present(OrtKernelContext *context, Attention &a,
                                            const Tensor &past_keys,
                                            const Tensor &past_values) const {
  a.key_cache = past_keys.data, a.value_cache = past_values.data;
  void *keys, *values;
  RETURN_IF_FAILED(output(context, 1, past_keys.sizes, 4, &keys));
  RETURN_IF_FAILED(output(context, 2, past_values.sizes, 4, &values));
  if (!keys || !values) return a.keys ? refused("GroupQueryAttention: no present keys") : nullptr;
  // Past and present are the same memory where the caller wants it so.
  const size_t bytes = past_keys.count * (a.half ? 2 : 4);
  if (keys != past_keys.data) memcpy(keys, past_keys.data, bytes);
  if (values != past_values.data) memcpy(values, past_values.data, bytes);
  a.key_cache = keys, a.value_cache = values;
  return nullptr;
}

template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::compute(OrtKernelContext *context) const {
  Attention a;
  Tensor past_keys, past_values;
  RETURN_IF_FAILED(inputs(context, a, past_keys, past_values));
  const int64_t sizes[] = {(int64_t)a.batch, (int64_t)a.tokens, (int64_t)(a.heads * a.size)};
  void *out;
  RETURN_IF_FAILED(output(context, 0, sizes, 3, &out));
  RETURN_IF_FAILED(present(context, a, past_keys, past_values));
  a.out = (float *)out;
  if (!a.batch || !a.tokens) return nullptr;
  Room first;
  if (!first.take(a.batch * sizeof(size_t))) return no_memory();
  for (size_t i = 0; i < a.batch; i++)
    first.as<size_t>()[i] = rolling_ ? moved(before(a, i), a.capacity) : 0;
  a.first = first.as<size_t>();
  return rolling_ ? attend_rolling(context, a) : attend(context, a);
}

template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::attend(OrtKernelContext *context, Attention &a) const {
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
  return in_parallel(context, combine, attend.strips(a));
}

// The position of the first row of a rolling cache, for a text of some length: rows move by as many
// as are beyond the window whenever they are full.
template <ONNXTensorElementDataType KEPT>
size_t AttentionKernel<KEPT>::moved(size_t length, size_t rows) const {
  const size_t step = rows - window_ + 1;
  return length <= rows ? 0 : (length - rows + step - 1) / step * step;
}

// In place while there is room; else in a larger cache, of which the last rows are kept.
template <ONNXTensorElementDataType KEPT>
OrtStatusPtr AttentionKernel<KEPT>::attend_rolling(OrtKernelContext *context, Attention &a) const {
  const size_t rows = a.capacity;
  size_t most = 0;
  bool moves = false;
  for (size_t i = 0; i < a.batch; i++) {
    const size_t needed = before(a, i) + a.tokens - a.first[i];
    most = needed > most ? needed : most;
    moves |= moved(length(a, i), rows) != a.first[i];
  }
  if (!moves) return attend(context, a);
  void *kept_keys = a.key_cache, *kept_values = a.value_cache;
  const size_t bytes = a.batch * a.kv_heads * most * a.size * (a.half ? 2 : 4);
  Room keys, values;
  if (!keys.take(bytes) || !values.take(bytes)) return no_memory();
  a.key_cache = keys.as<void>(), a.value_cache = values.as<void>(), a.capacity = most;
  for (size_t i = 0; i < a.batch; i++) {
    const size_t count = before(a, i) - a.first[i];
    copy_rows(a, i, kept_keys, rows, 0, a.key_cache, most, 0, count);
    copy_rows(a, i, kept_values, rows, 0, a.value_cache, most, 0, count);
  }
  RETURN_IF_FAILED(attend(context, a));
  for (size_t i = 0; i < a.batch; i++) {
    const size_t start = moved(length(a, i), rows), count = length(a, i) - start;
    copy_rows(a, i, a.key_cache, most, start - a.first[i], kept_keys, rows, 0, count);
    copy_rows(a, i, a.value_cache, most, start - a.first[i], kept_values, rows, 0, count);
  }
  return nullptr;
}

template class AttentionKernel<HALF>;
template class AttentionKernel<FLOAT>;
