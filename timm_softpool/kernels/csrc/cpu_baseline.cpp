// The kernels for every processor: SSE2 on x86-64, NEON on 64-bit Arm.
#define SOFT_POOL_ISA baseline
#define SOFT_POOL_BYTES 16
#include "isa.h"
