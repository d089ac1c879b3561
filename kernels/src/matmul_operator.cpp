#include "matmul_operator.h"

#include <string.h>

#include "kernels.h"

namespace {
constexpr size_t ROWS = 16;         // of inputs, that a task rounds, or gates at once
constexpr size_t TASK_OUTPUTS = 32;
constexpr size_t MOST_TASKS = 64;

size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Eight sums side by side, which a compiler makes vectors of.
float sum_of(const float *x, size_t count) {
  float parts[8] = {};
  size_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (size_t j = 0; j < 8; j++) parts[j] += x[i + j];
  for (size_t j = 0; i + j < count; j++) parts[j] += x[i + j];
  for (size_t half = 4; half; half /= 2)
    for (size_t j = 0; j < half; j++) parts[j] += parts[j + half];
  return parts[0];
}
}  // namespace

OrtStatusPtr MatMulKernel::create(const OrtKernelInfo *info) {
  RETURN_IF_FAILED(attribute(info, "K", k_));
  RETURN_IF_FAILED(attribute(info, "N", n_));
  RETURN_IF_FAILED(attribute(info, "bits", bits_));
  RETURN_IF_FAILED(attribute(info, "block_size", block_));
  RETURN_IF_FAILED(attribute(info, "input_bits", input_bits_));
  RETURN_IF_FAILED(attribute(info, "group", group_));
  RETURN_IF_FAILED(attribute(info, "copies", copies_));
  RETURN_IF_FAILED(attribute(info, "gate", gate_));
  const bool known = block_ == 16 || block_ == 32 || block_ == 64 || block_ == 128 || block_ == 256;
  if ((bits_ != 4 && bits_ != 8) || !known || !k_ || !n_)
    return refused("MatMulNBits: takes 4 or 8 bits in blocks of 16, 32, 64, 128 or 256");
  if (input_bits_ != 8 && input_bits_ != 15) return refused("MatMulNBits: inputs have 8 or 15 bits");
  if (gate_ > 2 || (gate_ && n_ % 2)) return refused("MatMulNBits: no such gate");
  if (group_ && !given()) return refused("MatMulNBits: K is no number of inputs with their sums");
  middle_ = (uint8_t *)malloc(blocks());
  if (!middle_) return no_memory();
  memset(middle_, bits_ == 4 ? 8 : 128, blocks());
  Tensor codes, scales, zeros;
  RETURN_IF_FAILED(constant_input(info, 1, codes));
  RETURN_IF_FAILED(constant_input(info, 2, scales));
  RETURN_IF_FAILED(constant_input(info, 3, zeros));
  size_t inputs;
  RETURN_IF_FAILED(api->KernelInfo_GetInputCount(info, &inputs));
  if (!codes.given || !scales.given || (inputs > 3 && !zeros.given)) return nullptr;
  RETURN_IF_FAILED(matrix(codes, scales, zeros, fixed_));
  if (!zeros.given) return nullptr;
  look_at_zeros(fixed_.zeros);
  return matrix(codes, scales, zeros, fixed_);
}

// How many inputs are given: K without their sums; 0 if there is no such number.
size_t MatMulKernel::given() const {
  if (!group_) return k_;
  const size_t sums = k_ / (group_ + copies_);
  return sums * (group_ + copies_) == k_ ? sums * group_ : 0;
}

// Zero points that are the same in all rows are told once, and read no more.
void MatMulKernel::look_at_zeros(const uint8_t *zeros) {
  const size_t row = (blocks() * bits_ + 7) / 8;
  for (size_t i = 1; i < n_; i++)
    if (memcmp(zeros, zeros + i * row, row)) return;
  for (size_t b = 0; b < blocks(); b++)
    middle_[b] = bits_ == 8 ? zeros[b] : zeros[b / 2] >> b % 2 * 4 & 15;
  same_zeros_ = true;
}

OrtStatusPtr MatMulKernel::matrix(const Tensor &codes, const Tensor &scales, const Tensor &zeros,
                                  Matrix &w) const {
  if (codes.count != n_ * blocks() * block_ * bits_ / 8)
    return refused("MatMulNBits: B has another size");
  if (scales.count != n_ * blocks() || (scales.type != HALF && scales.type != FLOAT))
    return refused("MatMulNBits: scales has another size or type");
  if (zeros.given && zeros.count != n_ * ((blocks() * bits_ + 7) / 8))
    return refused("MatMulNBits: zero_points has another size");
  w.codes = (const uint8_t *)codes.data;
  w.scales = scales.data;
  w.zeros = zeros.given && !same_zeros_ ? (const uint8_t *)zeros.data : nullptr;
  w.middle = middle_;
  w.half_scales = scales.type == HALF;
  w.coarse = input_bits_ == 8;
  w.bits = (int)bits_, w.block = (int)block_;
  w.k = k_, w.n = n_, w.blocks = blocks();
  return nullptr;
}

OrtStatusPtr MatMulKernel::given_matrix(OrtKernelContext *context, Matrix &w) const {
  if (fixed_.codes) return w = fixed_, nullptr;
  Tensor codes, scales, zeros;
  RETURN_IF_FAILED(read_input(context, 1, codes));
  RETURN_IF_FAILED(read_input(context, 2, scales));
  RETURN_IF_FAILED(read_input(context, 3, zeros));
  return matrix(codes, scales, zeros, w);
}

OrtStatusPtr MatMulKernel::round(OrtKernelContext *context, const Matrix &w, const Tensor &x,
                                 uint8_t *rounded) const {
  const size_t width = x.last(), rows = x.count / width, step = kernels->matmul.rounded_bytes(w);
  const size_t tasks = (rows + ROWS - 1) / ROWS, sums = group_ ? width / group_ : 0;
  Room extended;  // a row with its sums, for each task
  if (group_ && !extended.take(tasks * k_ * sizeof(float))) return no_memory();
  auto job = [&](size_t task) {
    for (size_t i = task * ROWS; i < least((task + 1) * ROWS, rows); i++) {
      const float *row = (const float *)x.data + i * width;
      if (group_) {
        float *to = extended.as<float>() + task * k_;
        memcpy(to, row, width * sizeof(float));
        for (size_t g = 0; g < sums; g++) {
          const float sum = sum_of(row + g * group_, group_);
          for (size_t c = 0; c < copies_; c++) to[width + c * sums + g] = sum;
        }
        row = to;
      }
      kernels->matmul.round(w, row, rounded + i * step);
    }
  };
  return in_parallel(context, job, tasks);
}

OrtStatusPtr MatMulKernel::compute(OrtKernelContext *context) const {
  const MatMul &matmul = kernels->matmul;
  Tensor x;
  Matrix w;
  RETURN_IF_FAILED(read_input(context, 0, x));
  RETURN_IF_FAILED(given_matrix(context, w));
  if (!x.axes || x.last() != given()) return refused("MatMulNBits: A has another size");
  const size_t rows = x.count / x.last(), width = gate_ ? n_ / 2 : n_;
  x.sizes[x.axes - 1] = (int64_t)width;
  void *data;
  RETURN_IF_FAILED(output(context, 0, x.sizes, x.axes, &data));
  if (!rows) return nullptr;
  x.sizes[x.axes - 1] = (int64_t)given();
  float *y = (float *)data;
  const size_t step = matmul.rounded_bytes(w);
  const size_t tasks = least((width + TASK_OUTPUTS - 1) / TASK_OUTPUTS, MOST_TASKS);
  const size_t most = (width + tasks - 1) / tasks + ROWS;  // outputs of a task
  Room room, halves;
  if (!room.take(rows * step)) return no_memory();
  if (gate_ && !halves.take(tasks * 2 * ROWS * most * sizeof(float))) return no_memory();
  const uint8_t *rounded = room.as<uint8_t>();
  RETURN_IF_FAILED(round(context, w, x, room.as<uint8_t>()));
  auto job = [&](size_t task) {
    // Multiples of 16 outputs: two threads never write to one line of the cache.
    const size_t parts = (width + 15) / 16;
    const size_t first = parts * task / tasks * 16;
    const size_t last = least(parts * (task + 1) / tasks * 16, width), count = last - first;
    if (first >= last) return;
    if (!gate_) return matmul.multiply(w, rounded, rows, first, last, y, width);
    float *a = halves.as<float>() + task * 2 * ROWS * most, *b = a + ROWS * count;
    for (size_t i = 0; i < rows; i += ROWS) {
      const size_t now = least(ROWS, rows - i);
      const uint8_t *in = rounded + i * step;
      matmul.multiply(w, in, now, first, last, a - first, count);
      matmul.multiply(w, in, now, width + first, width + last, b - width - first, count);
      for (size_t j = 0; j < now; j++)
        matmul.gate(gate_ == 2, a + j * count, b + j * count, count, y + (i + j) * width + first);
    }
  };
  return in_parallel(context, job, tasks);
}
