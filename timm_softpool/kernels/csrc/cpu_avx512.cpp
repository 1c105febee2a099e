// The kernels for processors with AVX-512 (x86-64-v4).
#include "geometry.h"
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define SOFT_POOL_ISA avx512
#define SOFT_POOL_BYTES 64
#include "isa.h"
#endif
