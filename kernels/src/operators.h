// What the operators share: tensors of ONNX Runtime, memory of a call, work on its threads.
#pragma once
#include <stdlib.h>

#include "ort_abi.h"

extern const OrtApi *api;  // of the library that took the operators

#define RETURN_IF_FAILED(call)                       \
  do {                                               \
    if (OrtStatusPtr failed = (call)) return failed; \
  } while (0)

inline OrtStatusPtr refused(const char *why) { return api->CreateStatus(ORT_INVALID_ARGUMENT, why); }
inline OrtStatusPtr no_memory() { return api->CreateStatus(ORT_FAIL, "edge_memllm: no memory"); }

constexpr auto FLOAT = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto HALF = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto BYTES = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto INTEGERS = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr auto ANY = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

struct Tensor {
  static constexpr size_t MOST_AXES = 8;

  bool given = false;
  void *data = nullptr;
  size_t axes = 0, count = 0;
  int64_t sizes[MOST_AXES] = {};
  ONNXTensorElementDataType type = ANY;

  size_t size(size_t axis) const { return (size_t)sizes[axis]; }
  size_t last() const { return axes ? size(axes - 1) : 1; }
};

OrtStatusPtr read(const OrtValue *value, Tensor &tensor);
OrtStatusPtr read_input(const OrtKernelContext *context, size_t index, Tensor &tensor);
// Null where nobody wants it, which only those outputs can be that are optional.
OrtStatusPtr output(OrtKernelContext *context, size_t index, const int64_t *sizes, size_t axes,
                    void **data);
// Not given where it is no constant, or there is none.
OrtStatusPtr constant_input(const OrtKernelInfo *info, size_t index, Tensor &tensor);
OrtStatusPtr attribute(const OrtKernelInfo *info, const char *name, size_t &value);

// Memory that goes with its scope, at an address that is a multiple of 64.
class Room {
 public:
  Room() = default;
  Room(const Room &) = delete;
  ~Room() { free(whole_); }

  // False if there is none. At most once.
  bool take(size_t bytes) {
    whole_ = malloc(bytes + 63);
    return whole_ != nullptr;
  }
  template <class T>
  T *as() const {
    return (T *)(((uintptr_t)whole_ + 63) & ~(uintptr_t)63);
  }

 private:
  void *whole_ = nullptr;
};

// Calls job(i) for i < tasks on the threads of the session.
template <class Job>
OrtStatusPtr in_parallel(const OrtKernelContext *context, Job &job, size_t tasks) {
  if (tasks == 1) return job(0), nullptr;
  auto one = [](void *data, size_t task) { (*(Job *)data)(task); };
  return api->KernelContext_ParallelFor(context, one, tasks, 0, &job);
}

// What a kernel is made of and does; `operators.cpp` makes an operator of it.
struct Slot {
  ONNXTensorElementDataType type;
  bool optional;
};
