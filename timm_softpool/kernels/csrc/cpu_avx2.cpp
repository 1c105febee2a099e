// The kernels for processors with AVX2 (x86-64-v3).
#include "geometry.h"
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define SOFT_POOL_ISA avx2
#define SOFT_POOL_BYTES 32
#include "isa.h"
#endif
