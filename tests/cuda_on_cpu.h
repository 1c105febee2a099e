// Lets g++ compile csrc/soft_pool.cu for a CPU, where blocks of one thread run one after the other.
#include <cmath>
#include <cstring>

#define __device__
#define __global__
#define __shared__ static
#define __syncthreads()

struct Index { int x; };
static const Index threadIdx{0}, blockDim{1};
extern "C" { Index blockIdx{0}; }  // the test counts it up

static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static float half_to_float(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return x; }
static unsigned short float_to_half(float x) {
    _Float16 half = x;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
