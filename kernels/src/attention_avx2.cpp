// Attention by AVX2.
#include "attention.h"

#if defined(__x86_64__)
#include "avx2.h"

namespace {
constexpr size_t QUERIES = 4, ACROSS = 2;
}  // namespace

#include "attention.inc"

const Attend attend_avx2 = {strips, tasks, partial_floats, prepare, run, combine};
#endif
