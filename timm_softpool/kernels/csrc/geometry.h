// What the kernels of every instruction set share with the code that calls them: plain data, no instructions.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// A pool of 1 to 3 axes as one of three: (1, 1, L), (H, 1, W) or (D, H, W). cpu.py fills it.
struct Geometry {
    int64_t batch, channels;
    int64_t in[3], out[3], kernel[3], stride[3], padding[3];

    int64_t cells() const { return kernel[0] * kernel[1] * kernel[2]; }  // of a window
    int64_t in_size() const { return in[0] * in[1] * in[2]; }
    int64_t out_size() const { return out[0] * out[1] * out[2]; }

    bool overlaps() const { return kernel[0] > stride[0] || kernel[1] > stride[1] || kernel[2] > stride[2]; }

    // Every cell of the input lies in a window.
    bool covers() const {
        for (int axis = 0; axis < 3; ++axis)
            if (stride[axis] > kernel[axis] ||
                (out[axis] - 1) * stride[axis] + kernel[axis] - padding[axis] < in[axis])
                return false;
        return true;
    }
};

// PyTorch's `torch_parallel_for`: calls `body(begin, end, context)` for parts of a range, on its own threads, and
// returns 0 if all went well.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain_size, Body body, void* context);

struct Call {
    Geometry geometry;
    ParallelFor parallel_for;  // null: everything on the calling thread
    const void* input;
    const void* grad_output;  // null in a forward pass
    void* result;
    int64_t threads;
    bool detach_weights;
};

enum Dtype { float32, float64, bfloat16, float16, dtypes };
enum Layout { planes, pixels, layouts };  // contiguous, channels_last

using Kernel = void (*)(const Call&);

struct Kernels {
    Kernel forward[dtypes][layouts], backward[dtypes][layouts];
};
