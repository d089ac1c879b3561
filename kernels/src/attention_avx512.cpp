// Attention by AVX-512.
#include "attention.h"

#if defined(__x86_64__)
#include "avx512.h"

namespace {
constexpr size_t QUERIES = 4, ACROSS = 4;
}  // namespace

#include "attention.inc"

const Attend attend_avx512 = {strips, tasks, partial_floats, prepare, run, combine};
#endif
