// What a custom operator needs of ONNX Runtime's C interface, and nothing else, so that building
// asks for no headers of ONNX Runtime.
//
// Names, order and signatures are facts of its include/onnxruntime/core/session/onnxruntime_c_api.h
// (MIT licence), as asked for in version 17, that of ONNX Runtime 1.17. The table of functions only
// ever grows at its end, so what is here holds in every later version.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_API_CALL __stdcall
#else
#define ORT_API_CALL
#endif

constexpr uint32_t ORT_API_VERSION = 17;

struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

typedef OrtStatus *OrtStatusPtr;  // null where all went well

enum OrtErrorCode {
  ORT_OK = 0,
  ORT_FAIL = 1,
  ORT_INVALID_ARGUMENT = 2,
  ORT_RUNTIME_EXCEPTION = 6,
  ORT_NOT_IMPLEMENTED = 9,
  ORT_INVALID_GRAPH = 10,
};

enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
};

enum OrtCustomOpInputOutputCharacteristic {
  INPUT_OUTPUT_REQUIRED = 0,
  INPUT_OUTPUT_OPTIONAL = 1,
  INPUT_OUTPUT_VARIADIC = 2,
};

enum OrtMemType {
  OrtMemTypeCPUInput = -2,
  OrtMemTypeCPUOutput = -1,
  OrtMemTypeDefault = 0,
};

// The table of functions. `unused_N` stands for those from place N on that are not called here.
struct OrtApi {
  typedef void(ORT_API_CALL *Unused)();

  OrtStatusPtr(ORT_API_CALL *CreateStatus)(OrtErrorCode code, const char *message);
  Unused unused_1[25];
  OrtStatusPtr(ORT_API_CALL *CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **out);
  OrtStatusPtr(ORT_API_CALL *CustomOpDomain_Add)(OrtCustomOpDomain *domain,
                                                 const struct OrtCustomOp *op);
  OrtStatusPtr(ORT_API_CALL *AddCustomOpDomain)(OrtSessionOptions *options,
                                                OrtCustomOpDomain *domain);
  Unused unused_29[22];
  OrtStatusPtr(ORT_API_CALL *GetTensorMutableData)(OrtValue *value, void **out);
  Unused unused_52[8];
  OrtStatusPtr(ORT_API_CALL *GetTensorElementType)(const OrtTensorTypeAndShapeInfo *info,
                                                   ONNXTensorElementDataType *out);
  OrtStatusPtr(ORT_API_CALL *GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info,
                                                 size_t *out);
  OrtStatusPtr(ORT_API_CALL *GetDimensions)(const OrtTensorTypeAndShapeInfo *info,
                                            int64_t *values, size_t count);
  Unused unused_63[2];
  OrtStatusPtr(ORT_API_CALL *GetTensorTypeAndShape)(const OrtValue *value,
                                                    OrtTensorTypeAndShapeInfo **out);
  Unused unused_66[19];
  OrtStatusPtr(ORT_API_CALL *KernelInfoGetAttribute_float)(const OrtKernelInfo *info,
                                                           const char *name, float *out);
  OrtStatusPtr(ORT_API_CALL *KernelInfoGetAttribute_int64)(const OrtKernelInfo *info,
                                                           const char *name, int64_t *out);
  Unused unused_87[1];
  OrtStatusPtr(ORT_API_CALL *KernelContext_GetInputCount)(const OrtKernelContext *context,
                                                          size_t *out);
  Unused unused_89[1];
  OrtStatusPtr(ORT_API_CALL *KernelContext_GetInput)(const OrtKernelContext *context, size_t index,
                                                     const OrtValue **out);
  OrtStatusPtr(ORT_API_CALL *KernelContext_GetOutput)(OrtKernelContext *context, size_t index,
                                                      const int64_t *dimensions, size_t count,
                                                      OrtValue **out);
  Unused unused_92[1];
  void(ORT_API_CALL *ReleaseStatus)(OrtStatus *status);
  Unused unused_94[5];
  void(ORT_API_CALL *ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);
  Unused unused_100[1];
  void(ORT_API_CALL *ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
  Unused unused_102[128];
  OrtStatusPtr(ORT_API_CALL *KernelInfo_GetInputCount)(const OrtKernelInfo *info, size_t *out);
  Unused unused_231[18];
  OrtStatusPtr(ORT_API_CALL *KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info,
                                                                size_t index, int *is_constant,
                                                                const OrtValue **out);
  Unused unused_250[24];
  // `batches` threads at most take parts of `total`; 0 leaves it to ONNX Runtime.
  OrtStatusPtr(ORT_API_CALL *KernelContext_ParallelFor)(const OrtKernelContext *context,
                                                        void (*function)(void *data, size_t index),
                                                        size_t total, size_t batches, void *data);
};

struct OrtApiBase {
  const OrtApi *(ORT_API_CALL *GetApi)(uint32_t version);  // null: older than that version
  const char *(ORT_API_CALL *GetVersionString)();
};

// An operator. Where a function is null, ONNX Runtime asks nothing: not so for those up to
// GetVariadicOutputHomogeneity, which must all be there.
struct OrtCustomOp {
  uint32_t version;
  void *(ORT_API_CALL *CreateKernel)(const OrtCustomOp *op, const OrtApi *api,
                                     const OrtKernelInfo *info);
  const char *(ORT_API_CALL *GetName)(const OrtCustomOp *op);
  const char *(ORT_API_CALL *GetExecutionProviderType)(const OrtCustomOp *op);
  ONNXTensorElementDataType(ORT_API_CALL *GetInputType)(const OrtCustomOp *op, size_t index);
  size_t(ORT_API_CALL *GetInputTypeCount)(const OrtCustomOp *op);
  ONNXTensorElementDataType(ORT_API_CALL *GetOutputType)(const OrtCustomOp *op, size_t index);
  size_t(ORT_API_CALL *GetOutputTypeCount)(const OrtCustomOp *op);
  void(ORT_API_CALL *KernelCompute)(void *kernel, OrtKernelContext *context);
  void(ORT_API_CALL *KernelDestroy)(void *kernel);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL *GetInputCharacteristic)(const OrtCustomOp *op,
                                                                             size_t index);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL *GetOutputCharacteristic)(const OrtCustomOp *op,
                                                                              size_t index);
  OrtMemType(ORT_API_CALL *GetInputMemoryType)(const OrtCustomOp *op, size_t index);
  int(ORT_API_CALL *GetVariadicInputMinArity)(const OrtCustomOp *op);
  int(ORT_API_CALL *GetVariadicInputHomogeneity)(const OrtCustomOp *op);
  int(ORT_API_CALL *GetVariadicOutputMinArity)(const OrtCustomOp *op);
  int(ORT_API_CALL *GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
  OrtStatusPtr(ORT_API_CALL *CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api,
                                             const OrtKernelInfo *info, void **kernel);
  OrtStatusPtr(ORT_API_CALL *KernelComputeV2)(void *kernel, OrtKernelContext *context);
  OrtStatusPtr(ORT_API_CALL *InferOutputShapeFn)(const OrtCustomOp *op,
                                                 OrtShapeInferContext *context);
  int(ORT_API_CALL *GetStartVersion)(const OrtCustomOp *op);
  int(ORT_API_CALL *GetEndVersion)(const OrtCustomOp *op);
  // Later than version 17, to be left null: here so that nobody reads beyond the end.
  size_t(ORT_API_CALL *GetMayInplace)(int **inputs, int **outputs);
  void(ORT_API_CALL *ReleaseMayInplace)(int *inputs, int *outputs);
  size_t(ORT_API_CALL *GetAliasMap)(int **inputs, int **outputs);
  void(ORT_API_CALL *ReleaseAliasMap)(int *inputs, int *outputs);
};

#define ORT_PLACE(function, place)                                       \
  static_assert(offsetof(OrtApi, function) == place * sizeof(void *),    \
                #function " is not at the place where ONNX Runtime has it")
ORT_PLACE(CreateStatus, 0);
ORT_PLACE(CreateCustomOpDomain, 26);
ORT_PLACE(CustomOpDomain_Add, 27);
ORT_PLACE(AddCustomOpDomain, 28);
ORT_PLACE(GetTensorMutableData, 51);
ORT_PLACE(GetTensorElementType, 60);
ORT_PLACE(GetDimensionsCount, 61);
ORT_PLACE(GetDimensions, 62);
ORT_PLACE(GetTensorTypeAndShape, 65);
ORT_PLACE(KernelInfoGetAttribute_float, 85);
ORT_PLACE(KernelInfoGetAttribute_int64, 86);
ORT_PLACE(KernelContext_GetInputCount, 88);
ORT_PLACE(KernelContext_GetInput, 90);
ORT_PLACE(KernelContext_GetOutput, 91);
ORT_PLACE(ReleaseStatus, 93);
ORT_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
ORT_PLACE(ReleaseCustomOpDomain, 101);
ORT_PLACE(KernelInfo_GetInputCount, 230);
ORT_PLACE(KernelInfoGetConstantInput_tensor, 249);
ORT_PLACE(KernelContext_ParallelFor, 274);
#undef ORT_PLACE

// Every field is a pointer or as wide as one, the version with what follows it.
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void *), "a field of OrtCustomOp is missing");
