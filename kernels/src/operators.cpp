// The operators of the domain `edge_memllm` and how ONNX Runtime gets them.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "matmul.h"
#include "ort_abi.h"
#include "processor.h"

#define RETURN_IF_FAILED(call)                        \
  do {                                                \
    if (OrtStatusPtr failed = (call)) return failed;  \
  } while (0)

namespace {

const OrtApi *api;

OrtStatusPtr failure(OrtErrorCode code, const char *message) {
  return api->CreateStatus(code, message);
}

#if defined(__x86_64__)

constexpr size_t MOST_DIMENSIONS = 8;
constexpr size_t MOST_TASKS = 8;
constexpr size_t ALIGNMENT = 64;

struct Kernel {
  int64_t K, N, bits, block_size;
};

struct Job {
  QuantisedMatrix weights;
  const uint8_t *rounded;
  size_t m, tasks;
  float *y;
};

void run(void *data, size_t task) {
  const Job &job = *(const Job *)data;
  const size_t n = job.weights.n, groups = (n + 15) / 16;
  const size_t first = groups * task / job.tasks * 16;
  const size_t last = groups * (task + 1) / job.tasks * 16;
  rows_by_few(job.weights, job.rounded, job.m, first, last < n ? last : n, job.y);
}

OrtStatusPtr create(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *info, void **out) {
  Kernel kernel;
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_int64(info, "K", &kernel.K));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_int64(info, "N", &kernel.N));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_int64(info, "bits", &kernel.bits));
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_int64(info, "block_size", &kernel.block_size));
  *out = malloc(sizeof kernel);
  if (!*out) return failure(ORT_FAIL, "MatMulNBits: no memory for a kernel");
  memcpy(*out, &kernel, sizeof kernel);
  return nullptr;
}

struct Shape {
  ONNXTensorElementDataType type;
  size_t count;
  int64_t dimensions[MOST_DIMENSIONS];
};

OrtStatusPtr shape_of(const OrtValue *value, Shape &shape) {
  OrtTensorTypeAndShapeInfo *info;
  RETURN_IF_FAILED(api->GetTensorTypeAndShape(value, &info));
  OrtStatusPtr failed = api->GetTensorElementType(info, &shape.type);
  if (!failed) failed = api->GetDimensionsCount(info, &shape.count);
  if (!failed && (shape.count < 1 || shape.count > MOST_DIMENSIONS))
    failed = failure(ORT_INVALID_ARGUMENT, "MatMulNBits: a tensor has none or too many dimensions");
  if (!failed) failed = api->GetDimensions(info, shape.dimensions, shape.count);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return failed;
}

OrtStatusPtr multiply(OrtKernelContext *context, Job &job, const float *x) {
  const size_t stride = rounded_bytes(job.weights);
  void *memory = malloc(stride * job.m + ALIGNMENT);
  if (!memory) return failure(ORT_FAIL, "MatMulNBits: no memory for rounded activations");
  uint8_t *rounded = (uint8_t *)(((uintptr_t)memory + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
  for (size_t i = 0; i < job.m; i++)
    round_row(job.weights, x + i * job.weights.k, rounded + i * stride);
  job.rounded = rounded;
  const size_t tasks = job.weights.n / 64;
  job.tasks = tasks < 1 ? 1 : tasks < MOST_TASKS ? tasks : MOST_TASKS;
  OrtStatusPtr failed = api->KernelContext_ParallelFor(context, run, job.tasks, 0, &job);
  free(memory);
  return failed;
}

OrtStatusPtr compute(void *data, OrtKernelContext *context) {
  const Kernel &kernel = *(const Kernel *)data;
  size_t count;
  RETURN_IF_FAILED(api->KernelContext_GetInputCount(context, &count));
  const OrtValue *inputs[4] = {};
  void *at[4] = {};
  for (size_t i = 0; i < count && i < 4; i++) {
    RETURN_IF_FAILED(api->KernelContext_GetInput(context, i, &inputs[i]));
    if (inputs[i]) RETURN_IF_FAILED(api->GetTensorMutableData((OrtValue *)inputs[i], &at[i]));
  }
  Shape x, scales;
  RETURN_IF_FAILED(shape_of(inputs[0], x));
  RETURN_IF_FAILED(shape_of(inputs[2], scales));

  Job job = {};
  job.m = 1;
  for (size_t i = 0; i + 1 < x.count; i++) job.m *= x.dimensions[i];
  x.dimensions[x.count - 1] = kernel.N;
  OrtValue *output;
  RETURN_IF_FAILED(
      api->KernelContext_GetOutput(context, 0, x.dimensions, x.count, &output));
  void *y;
  RETURN_IF_FAILED(api->GetTensorMutableData(output, &y));
  job.y = (float *)y;
  job.weights = {(const uint8_t *)at[1],
                 at[2],
                 (const uint8_t *)at[3],
                 scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                 (int)kernel.bits,
                 (int)kernel.block_size,
                 (size_t)kernel.K,
                 (size_t)kernel.N,
                 (size_t)((kernel.K + kernel.block_size - 1) / kernel.block_size)};
  return multiply(context, job, (const float *)at[0]);
}

ONNXTensorElementDataType input_type(const OrtCustomOp *, size_t index) {
  if (index == 0) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (index == 2) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // float16 or float32
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

void describe(OrtCustomOp &op) {
  op = {};
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp *) { return "MatMulNBits"; };
  op.GetExecutionProviderType = [](const OrtCustomOp *) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp *) -> size_t { return 4; };
  op.GetInputType = input_type;
  op.GetInputCharacteristic = [](const OrtCustomOp *, size_t index) {
    return index == 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp *, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp *) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp *) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp *) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp *) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = free;
}

OrtCustomOp matmul;

OrtStatusPtr add_operators(OrtSessionOptions *options) {
  if (processor() < Processor::AVX512_VNNI)
    return failure(ORT_NOT_IMPLEMENTED,
                   "edge_memllm: no operators for this processor, or EDGE_MEMLLM_KERNELS forbids them");
  describe(matmul);
  OrtCustomOpDomain *domain;
  RETURN_IF_FAILED(api->CreateCustomOpDomain("edge_memllm", &domain));
  OrtStatusPtr failed = api->CustomOpDomain_Add(domain, &matmul);
  if (!failed) failed = api->AddCustomOpDomain(options, domain);
  if (failed) api->ReleaseCustomOpDomain(domain);
  return failed;
}

#else

OrtStatusPtr add_operators(OrtSessionOptions *) {
  return failure(ORT_NOT_IMPLEMENTED, "edge_memllm: there are operators for x86-64 alone");
}

#endif

}  // namespace

EDGE_MEMLLM_EXPORT OrtStatusPtr ORT_API_CALL RegisterCustomOps(OrtSessionOptions *options,
                                                               const OrtApiBase *base) {
  api = base->GetApi(ORT_API_VERSION);
  if (api) return add_operators(options);
  return base->GetApi(1)->CreateStatus(
      ORT_NOT_IMPLEMENTED, "edge_memllm: needs ONNX Runtime 1.17 or newer");
}
