// The operators of the domain `edge_memllm`, and how ONNX Runtime gets them.
#include "operators.h"

#include "attention_operator.h"
#include "kernels.h"
#include "matmul_operator.h"

const OrtApi *api;
const Kernels *kernels;

OrtStatusPtr read(const OrtValue *value, Tensor &tensor) {
  tensor.given = true;
  OrtTensorTypeAndShapeInfo *info;
  RETURN_IF_FAILED(api->GetTensorTypeAndShape(value, &info));
  OrtStatusPtr failed = api->GetDimensionsCount(info, &tensor.axes);
  if (!failed && tensor.axes > Tensor::MOST_AXES) failed = refused("edge_memllm: too many axes");
  if (!failed) failed = api->GetDimensions(info, tensor.sizes, tensor.axes);
  if (!failed) failed = api->GetTensorElementType(info, &tensor.type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (failed) return failed;
  tensor.count = 1;
  for (size_t i = 0; i < tensor.axes; i++) tensor.count *= tensor.size(i);
  return api->GetTensorMutableData(const_cast<OrtValue *>(value), &tensor.data);
}

OrtStatusPtr read_input(const OrtKernelContext *context, size_t index, Tensor &tensor) {
  size_t count;
  RETURN_IF_FAILED(api->KernelContext_GetInputCount(context, &count));
  const OrtValue *value = nullptr;
  if (index < count) RETURN_IF_FAILED(api->KernelContext_GetInput(context, index, &value));
  return value ? read(value, tensor) : nullptr;
}

OrtStatusPtr constant_input(const OrtKernelInfo *info, size_t index, Tensor &tensor) {
  size_t count;
  RETURN_IF_FAILED(api->KernelInfo_GetInputCount(info, &count));
  int constant = 0;
  const OrtValue *value = nullptr;
  if (index < count)
    RETURN_IF_FAILED(api->KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
  return constant && value ? read(value, tensor) : nullptr;
}

OrtStatusPtr output(OrtKernelContext *context, size_t index, const int64_t *sizes, size_t axes,
                    void **data) {
  OrtValue *value = nullptr;
  RETURN_IF_FAILED(api->KernelContext_GetOutput(context, index, sizes, axes, &value));
  *data = nullptr;
  return value ? api->GetTensorMutableData(value, data) : nullptr;
}

OrtStatusPtr attribute(const OrtKernelInfo *info, const char *name, size_t &value) {
  int64_t found;
  RETURN_IF_FAILED(api->KernelInfoGetAttribute_int64(info, name, &found));
  if (found < 0 || found > INT32_MAX) return refused("edge_memllm: an attribute is out of range");
  value = (size_t)found;
  return nullptr;
}

namespace {

template <class Kernel>
OrtStatusPtr ORT_API_CALL create(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *info,
                                 void **out) {
  Kernel *kernel = (Kernel *)calloc(1, sizeof(Kernel));
  if (!kernel) return no_memory();
  OrtStatusPtr failed = kernel->create(info);
  if (failed) {
    kernel->destroy();
    free(kernel);
  } else {
    *out = kernel;
  }
  return failed;
}

template <class Kernel>
void describe(OrtCustomOp &op) {
  op = {};
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp *) { return Kernel::NAME; };
  op.GetExecutionProviderType = [](const OrtCustomOp *) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp *) { return sizeof Kernel::INPUTS / sizeof(Slot); };
  op.GetInputType = [](const OrtCustomOp *, size_t index) { return Kernel::INPUTS[index].type; };
  op.GetInputCharacteristic = [](const OrtCustomOp *, size_t index) {
    return Kernel::INPUTS[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp *) { return sizeof Kernel::OUTPUTS / sizeof(Slot); };
  op.GetOutputType = [](const OrtCustomOp *, size_t index) { return Kernel::OUTPUTS[index].type; };
  op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t index) {
    return Kernel::OUTPUTS[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetVariadicInputMinArity = [](const OrtCustomOp *) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp *) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp *) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp *) { return 0; };
  op.CreateKernelV2 = create<Kernel>;
  op.KernelComputeV2 = [](void *kernel, OrtKernelContext *context) {
    return ((const Kernel *)kernel)->compute(context);
  };
  op.KernelDestroy = [](void *kernel) {
    ((Kernel *)kernel)->destroy();
    free(kernel);
  };
}

OrtCustomOp operators[3];

OrtStatusPtr add_operators(OrtSessionOptions *options) {
  kernels = kernels_of(processor());
  if (!kernels)
    return api->CreateStatus(
        ORT_NOT_IMPLEMENTED,
        "edge_memllm: no operators for this processor, or EDGE_MEMLLM_KERNELS forbids them");
  describe<MatMulKernel>(operators[0]);
  describe<AttentionKernel<HALF>>(operators[1]);
  describe<AttentionKernel<FLOAT>>(operators[2]);
  OrtCustomOpDomain *domain;
  RETURN_IF_FAILED(api->CreateCustomOpDomain("edge_memllm", &domain));
  OrtStatusPtr failed = nullptr;
  for (OrtCustomOp &op : operators)
    if (!failed) failed = api->CustomOpDomain_Add(domain, &op);
  if (!failed) failed = api->AddCustomOpDomain(options, domain);
  if (failed) api->ReleaseCustomOpDomain(domain);
  return failed;
}

}  // namespace

const Kernels *kernels_of(Processor processor) {
#if defined(__x86_64__)
  static constexpr Kernels AVX2 = {matmul_avx2, attend_avx2};
  static constexpr Kernels AVX512 = {matmul_avx512, attend_avx512};
  if (processor == Processor::AVX512_VNNI) return &AVX512;
  if (processor == Processor::AVX2) return &AVX2;
#endif
  (void)processor;
  return nullptr;
}

EDGE_MEMLLM_EXPORT OrtStatusPtr ORT_API_CALL RegisterCustomOps(OrtSessionOptions *options,
                                                               const OrtApiBase *base) {
  api = base->GetApi(ORT_API_VERSION);
  if (api) return add_operators(options);
  return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED,
                                       "edge_memllm: needs ONNX Runtime 1.17 or newer");
}
