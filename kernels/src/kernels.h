// The kernels that this processor takes.
#pragma once
#include "attention.h"
#include "matmul.h"
#include "processor.h"

struct Kernels {
  const MatMul &matmul;
  const Attend &attend;
};

// What `processor()` stands for; null for NONE.
const Kernels *kernels_of(Processor processor);

extern const Kernels *kernels;  // those of the operators that were registered last
