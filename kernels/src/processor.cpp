#include "processor.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)

bool all(unsigned long long word, unsigned long long bits) { return (word & bits) == bits; }

// Which registers the system saves when it changes between threads. Only where OSXSAVE is set.
unsigned long long saved_registers() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (unsigned long long)high << 32 | low;
}

// The compilers' own __builtin_cpu_supports needs a part of their run time library, which differs.
Processor found() {
  constexpr unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28, F16C = 1u << 29;  // 1: ecx
  constexpr unsigned AVX2 = 1u << 5;                                                       // 7: ebx
  constexpr unsigned F = 1u << 16, DQ = 1u << 17, BW = 1u << 30, VL = 1u << 31;
  constexpr unsigned VNNI = 1u << 11;  // 7: ecx
  constexpr unsigned XMM = 1u << 1, YMM = 1u << 2, MASKS = 1u << 5, ZMM = 1u << 6, ZMM_16 = 1u << 7;

  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Processor::NONE;
  if (!all(ecx, FMA | OSXSAVE | AVX | F16C)) return Processor::NONE;
  const unsigned long long saved = saved_registers();
  if (!all(saved, XMM | YMM)) return Processor::NONE;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Processor::NONE;
  if (!all(ebx, AVX2)) return Processor::NONE;
  const bool wide = all(saved, MASKS | ZMM | ZMM_16) && all(ebx, F | DQ | BW | VL);
  return wide && all(ecx, VNNI) ? Processor::AVX512_VNNI : Processor::AVX2;
}

#else

Processor found() { return Processor::NONE; }

#endif

const char *name(Processor processor) {
  switch (processor) {
    case Processor::AVX512_VNNI: return "avx512-vnni";
    case Processor::AVX2: return "avx2";
    case Processor::NONE: break;
  }
  return "";
}

Processor allowed() {
  const char *most = getenv("EDGE_MEMLLM_KERNELS");
  if (!most || !*most) return Processor::AVX512_VNNI;
  if (!strcmp(most, name(Processor::AVX512_VNNI))) return Processor::AVX512_VNNI;
  return strcmp(most, name(Processor::AVX2)) ? Processor::NONE : Processor::AVX2;
}

}  // namespace

Processor processor() {
  const Processor most = allowed(), here = found();
  return here < most ? here : most;
}

const char *edge_memllm_processor(void) { return name(processor()); }
