// The CUDA backend: three kernels without headers, for NVRTC. cuda.py defines, for each pool:
//   STORAGE                  how numbers are stored: float, double, Bfloat16 or Float16
//   K0..K2, S0..S2, P0..P2   kernel size, stride and padding of the axes (1, 1, L), (H, 1, W) or (D, H, W)
//   CHANNELS_LAST            0 or 1
//   PACK                     windows (channels, if they come last) that a thread of the window kernels serves
//   DETACH_WEIGHTS           0 or 1
//   TILE_C, TILE0..TILE2     channels and windows of each axis that a block of threads serves, if windows overlap
// Sizes are below 2^31, so that indices are int.

struct Bfloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };

template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
using T = STORAGE;
using A = Accumulator<T>::type;  // how they are computed with

#if defined(__CUDACC_RTC__)  // a test that compiles this for a CPU brings its own
__device__ inline float half_to_float(unsigned short bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}
__device__ inline unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(Bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widened(Float16 x) { return half_to_float(x.bits); }

__device__ inline void narrow(float x, float& result) { result = x; }
__device__ inline void narrow(double x, double& result) { result = x; }
__device__ inline void narrow(float x, Bfloat16& result) {
    unsigned u = __float_as_uint(x);
    result.bits = x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0;  // half to even
}
__device__ inline void narrow(float x, Float16& result) { result.bits = float_to_half(x); }

__device__ inline float exp_2(float x) { return exp2f(x); }
__device__ inline double exp_2(double x) { return exp2(x); }
__device__ inline bool is_finite(A x) { return x - x == 0; }

#define LOG2_E A(1.4426950408889634)
#define LN_2 A(0.69314718055994531)
#define NEGATIVE_INFINITY A(__uint_as_float(0xff800000))

constexpr int CELLS = K0 * K1 * K2;

struct Shape {
    int channels, in0, in1, in2, out0, out1, out2;
};

// Several numbers that are read and written at once.
struct alignas(PACK * sizeof(T)) Pack { T numbers[PACK]; };

// Number (x0, x1, x2) of channel c of sample n in memory.
__device__ inline int place(int n, int c, int x0, int x1, int x2, int channels, int size0, int size1, int size2) {
    return CHANNELS_LAST ? (((n * size0 + x0) * size1 + x1) * size2 + x2) * channels + c
                         : (((n * channels + c) * size0 + x0) * size1 + x1) * size2 + x2;
}

// (x - max) / ln 2. That of -inf is finite, for 0 * -inf is not 0; NaN stays NaN.
__device__ inline A exponent(A x, A max) {
    A y = (x - max) * LOG2_E;
    return y < -1100 ? A(-1100) : y;
}

struct Window {
    A max, total, mean;  // mean of the exponents, weighted

    __device__ explicit Window(const A (&cells)[CELLS]) : max(cells[0]), total(0), mean(0) {
#pragma unroll
        for (int i = 1; i < CELLS; ++i) max = cells[i] > max ? cells[i] : max;
#pragma unroll
        for (int i = 0; i < CELLS; ++i) {
            A y = exponent(cells[i], max), weight = exp_2(y);
            total += weight;
            mean += weight * y;
        }
        mean /= total;
    }

    // A NaN or an infinite maximum makes the mean NaN.
    __device__ A value(const A (&cells)[CELLS]) const {
        if (is_finite(mean)) return max + mean * LN_2;
        for (int i = 0; i < CELLS; ++i)
            if (cells[i] != cells[i]) return cells[i];
        return max;
    }
};

// d out / d x * grad, with scale = grad / total.
__device__ inline A gradient(A y, A mean, A scale) {
    if (!is_finite(mean)) return 0;
    return exp_2(y) * scale * (DETACH_WEIGHTS ? A(1) : 1 + LN_2 * (y - mean));
}

// Where the PACK windows of a thread begin.
struct Place {
    int n, c, o0, o1, o2;

    __device__ Place(int index, const Shape& s) {
        if (CHANNELS_LAST) {
            int packs = s.channels / PACK;
            c = index % packs * PACK, index /= packs;
            o2 = index % s.out2, index /= s.out2;
        } else {
            int packs = s.out2 / PACK;
            o2 = index % packs * PACK, index /= packs;
        }
        o1 = index % s.out1, index /= s.out1;
        o0 = index % s.out0, index /= s.out0;
        if (CHANNELS_LAST) n = index;
        else c = index % s.channels, n = index / s.channels;
    }
};

// Calls `body(cell, k0, k1, k2, x0, x1, x2, inside)` for the cells of the window.
template <class F> __device__ inline void for_cells(const Place& p, const Shape& s, F body) {
    int cell = 0;
#pragma unroll
    for (int k0 = 0; k0 < K0; ++k0)
#pragma unroll
        for (int k1 = 0; k1 < K1; ++k1)
#pragma unroll
            for (int k2 = 0; k2 < K2; ++k2) {
                int x0 = p.o0 * S0 - P0 + k0, x1 = p.o1 * S1 - P1 + k1, x2 = p.o2 * S2 - P2 + k2;
                body(cell++, x0, x1, x2, (unsigned)x0 < s.in0 && (unsigned)x1 < s.in1 && (unsigned)x2 < s.in2);
            }
}

// The cells of the PACK windows of a thread. Without overlap or padding along a contiguous last axis, a row of them
// is one pack after the other.
__device__ inline void load_cells(const T* input, const Place& p, const Shape& s, A (&cells)[PACK][CELLS]) {
#if CHANNELS_LAST
    for_cells(p, s, [&](int cell, int x0, int x1, int x2, bool inside) {
        if (inside) {
            Pack pack = *(const Pack*)(input + place(p.n, p.c, x0, x1, x2, s.channels, s.in0, s.in1, s.in2));
#pragma unroll
            for (int v = 0; v < PACK; ++v) cells[v][cell] = widened(pack.numbers[v]);
        } else {
#pragma unroll
            for (int v = 0; v < PACK; ++v) cells[v][cell] = NEGATIVE_INFINITY;
        }
    });
#elif PACK > 1
#pragma unroll
    for (int k0 = 0; k0 < K0; ++k0)
#pragma unroll
        for (int k1 = 0; k1 < K1; ++k1) {
            int x0 = p.o0 * S0 + k0, x1 = p.o1 * S1 + k1;
            const Pack* row = (const Pack*)(input + place(p.n, p.c, x0, x1, p.o2 * S2, s.channels, s.in0, s.in1, s.in2));
#pragma unroll
            for (int i = 0; i < K2; ++i) {
                Pack pack = row[i];
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    int k2 = i * PACK + v;
                    cells[k2 / K2][(k0 * K1 + k1) * K2 + k2 % K2] = widened(pack.numbers[v]);
                }
            }
        }
#else
    for_cells(p, s, [&](int cell, int x0, int x1, int x2, bool inside) {
        cells[0][cell] = inside
            ? A(widened(input[place(p.n, p.c, x0, x1, x2, s.channels, s.in0, s.in1, s.in2)])) : NEGATIVE_INFINITY;
    });
#endif
}

extern "C" __global__ void forward(const T* __restrict__ input, T* __restrict__ output, int count, int channels,
                                   int in0, int in1, int in2, int out0, int out1, int out2) {
    const Shape s{channels, in0, in1, in2, out0, out1, out2};
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    const Place p(index, s);
    A cells[PACK][CELLS];
    load_cells(input, p, s, cells);
    Pack result;
#pragma unroll
    for (int v = 0; v < PACK; ++v) narrow(Window(cells[v]).value(cells[v]), result.numbers[v]);
    ((Pack*)output)[index] = result;
}

// For windows that do not overlap: each writes the gradient of its own cells.
extern "C" __global__ void backward_apart(const T* __restrict__ input, const T* __restrict__ grad_output,
                                          T* __restrict__ grad_input, int count, int channels,
                                          int in0, int in1, int in2, int out0, int out1, int out2) {
    const Shape s{channels, in0, in1, in2, out0, out1, out2};
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    const Place p(index, s);
    A cells[PACK][CELLS];
    load_cells(input, p, s, cells);
    const Pack grad = ((const Pack*)grad_output)[index];
#pragma unroll
    for (int v = 0; v < PACK; ++v) {
        const Window window(cells[v]);
        const A scale = widened(grad.numbers[v]) / window.total;
#pragma unroll
        for (int i = 0; i < CELLS; ++i)
            cells[v][i] = gradient(exponent(cells[v][i], window.max), window.mean, scale);
    }
#if CHANNELS_LAST
    for_cells(p, s, [&](int cell, int x0, int x1, int x2, bool inside) {
        if (!inside) return;
        Pack pack;
#pragma unroll
        for (int v = 0; v < PACK; ++v) narrow(cells[v][cell], pack.numbers[v]);
        *(Pack*)(grad_input + place(p.n, p.c, x0, x1, x2, channels, in0, in1, in2)) = pack;
    });
#elif PACK > 1
#pragma unroll
    for (int k0 = 0; k0 < K0; ++k0)
#pragma unroll
        for (int k1 = 0; k1 < K1; ++k1) {
            int x0 = p.o0 * S0 + k0, x1 = p.o1 * S1 + k1;
            Pack* row = (Pack*)(grad_input + place(p.n, p.c, x0, x1, p.o2 * S2, channels, in0, in1, in2));
#pragma unroll
            for (int i = 0; i < K2; ++i) {
                Pack pack;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    int k2 = i * PACK + v;
                    narrow(cells[k2 / K2][(k0 * K1 + k1) * K2 + k2 % K2], pack.numbers[v]);
                }
                row[i] = pack;
            }
        }
#else
    for_cells(p, s, [&](int cell, int x0, int x1, int x2, bool inside) {
        if (inside) narrow(cells[0][cell], grad_input[place(p.n, p.c, x0, x1, x2, channels, in0, in1, in2)]);
    });
#endif
}

// For windows that overlap. A block of threads serves the cells that begin under some windows of some channels: first
// it computes what every window that reaches into them has in common, then each cell gathers from its windows, in
// their order, so that the result is always the same.
// TILE_C channels and TILE0 x TILE1 x TILE2 windows.
constexpr int HALO0 = (K0 - 1) / S0, HALO1 = (K1 - 1) / S1, HALO2 = (K2 - 1) / S2;  // windows before the tile
constexpr int WINDOWS0 = TILE0 + HALO0, WINDOWS1 = TILE1 + HALO1, WINDOWS2 = TILE2 + HALO2;

extern "C" __global__ void backward_overlapping(const T* __restrict__ input, const T* __restrict__ grad_output,
                                                T* __restrict__ grad_input, int /* blocks */, int channels,
                                                int in0, int in1, int in2, int out0, int out1, int out2) {
    const Shape s{channels, in0, in1, in2, out0, out1, out2};
    __shared__ A max[WINDOWS0 * WINDOWS1 * WINDOWS2 * TILE_C];
    __shared__ A mean[WINDOWS0 * WINDOWS1 * WINDOWS2 * TILE_C];
    __shared__ A scale[WINDOWS0 * WINDOWS1 * WINDOWS2 * TILE_C];
    const int tiles0 = (in0 + P0 + S0 * TILE0 - 1) / (S0 * TILE0), tiles1 = (in1 + P1 + S1 * TILE1 - 1) / (S1 * TILE1);
    const int tiles2 = (in2 + P2 + S2 * TILE2 - 1) / (S2 * TILE2), tiles_c = (channels + TILE_C - 1) / TILE_C;
    int rest = blockIdx.x;
    const int c0 = rest % tiles_c * TILE_C; rest /= tiles_c;
    const int begin2 = rest % tiles2 * TILE2; rest /= tiles2;
    const int begin1 = rest % tiles1 * TILE1; rest /= tiles1;
    const int begin0 = rest % tiles0 * TILE0;
    const int n = rest / tiles0;

    for (int i = threadIdx.x; i < WINDOWS0 * WINDOWS1 * WINDOWS2 * TILE_C; i += blockDim.x) {
        Place p(0, s);
        p.n = n;
        p.c = c0 + i % TILE_C;
        p.o2 = begin2 - HALO2 + i / TILE_C % WINDOWS2;
        p.o1 = begin1 - HALO1 + i / TILE_C / WINDOWS2 % WINDOWS1;
        p.o0 = begin0 - HALO0 + i / TILE_C / WINDOWS2 / WINDOWS1;
        if (p.c >= channels || (unsigned)p.o0 >= out0 || (unsigned)p.o1 >= out1 || (unsigned)p.o2 >= out2) continue;
        A cells[CELLS];
        for_cells(p, s, [&](int cell, int x0, int x1, int x2, bool inside) {
            cells[cell] = inside ? A(widened(input[place(n, p.c, x0, x1, x2, channels, in0, in1, in2)]))
                                 : NEGATIVE_INFINITY;
        });
        const Window window(cells);
        max[i] = window.max;
        mean[i] = window.mean;
        scale[i] = widened(grad_output[place(n, p.c, p.o0, p.o1, p.o2, channels, out0, out1, out2)]) / window.total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE0 * S0 * TILE1 * S1 * TILE2 * S2 * TILE_C; i += blockDim.x) {
        const int c = i % TILE_C, y2 = i / TILE_C % (TILE2 * S2), y1 = i / TILE_C / (TILE2 * S2) % (TILE1 * S1);
        const int y0 = i / TILE_C / (TILE2 * S2) / (TILE1 * S1);  // of the cells that begin under the tile
        const int x0 = begin0 * S0 - P0 + y0, x1 = begin1 * S1 - P1 + y1, x2 = begin2 * S2 - P2 + y2;
        if (c0 + c >= channels || (unsigned)x0 >= in0 || (unsigned)x1 >= in1 || (unsigned)x2 >= in2) continue;
        const int cell = place(n, c0 + c, x0, x1, x2, channels, in0, in1, in2);
        const A x = widened(input[cell]);
        A sum = 0;
#pragma unroll
        for (int w0 = 0; w0 <= HALO0; ++w0)
#pragma unroll
            for (int w1 = 0; w1 <= HALO1; ++w1)
#pragma unroll
                for (int w2 = 0; w2 <= HALO2; ++w2) {
                    const int o0 = y0 / S0 + w0, o1 = y1 / S1 + w1, o2 = y2 / S2 + w2;  // from the halo on
                    const int g0 = begin0 - HALO0 + o0, g1 = begin1 - HALO1 + o1, g2 = begin2 - HALO2 + o2;
                    if (y0 + (HALO0 - o0) * S0 >= K0 || y1 + (HALO1 - o1) * S1 >= K1 ||
                        y2 + (HALO2 - o2) * S2 >= K2 || (unsigned)g0 >= out0 || (unsigned)g1 >= out1 ||
                        (unsigned)g2 >= out2)
                        continue;
                    const int w = ((o0 * WINDOWS1 + o1) * WINDOWS2 + o2) * TILE_C + c;
                    sum += gradient(exponent(x, max[w]), mean[w], scale[w]);
                }
        narrow(sum, grad_input[cell]);
    }
}
