// What the processor offers to the operators.
#pragma once

#ifdef _WIN32
#define EDGE_MEMLLM_EXPORT extern "C" __declspec(dllexport)
#else
#define EDGE_MEMLLM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Each offers what those before it do.
enum class Processor {
  NONE,         // nothing that there are operators for
  AVX2,         // AVX2, FMA, F16C
  AVX512_VNNI,  // and AVX-512 F, BW, VL, DQ, VNNI
};

// What may be used: of this processor, with the registers that the system saves, and no more than
// the environment variable EDGE_MEMLLM_KERNELS allows ("none", "avx2"). Where that says something
// else than a name of `edge_memllm_processor`, nothing may be.
Processor processor();

// The same as a name: "avx512-vnni", "avx2", or "" for nothing.
EDGE_MEMLLM_EXPORT const char *edge_memllm_processor(void);
