// SoftPool of channels_last maps, with a vector along the channels.
#pragma once
#include "window.h"

namespace SOFT_POOL_ISA {

// The pixels under the taps of a window, for the windows of one row after the other.
template <class T> struct Taps {
    const Geometry& g;
    Buffer<T*> rows, pixels;
    T* outside;  // what stands for a pixel outside the map

    Taps(const Geometry& g, T* outside)
        : g(g), rows(g.kernel[0] * g.kernel[1]), pixels(g.cells()), outside(outside) {}

    // Go to the windows of row (oa, ob); `row(a, b)` is the first pixel of a row of the map.
    template <class F> INLINE void go_to_row(int64_t oa, int64_t ob, F row) {
        T** target = rows.data;
        for (int64_t a = oa * g.stride[0] - g.padding[0], ka = 0; ka < g.kernel[0]; ++a, ++ka)
            for (int64_t b = ob * g.stride[1] - g.padding[1], kb = 0; kb < g.kernel[1]; ++b, ++kb)
                *target++ = a >= 0 && a < g.in[0] && b >= 0 && b < g.in[1] ? row(a, b) : nullptr;
    }

    // Go to window `oc` of the row, of pixels that are `size` numbers apart; fills `pixels`.
    INLINE void go_to(int64_t oc, int64_t size) {
        const int64_t start = oc * g.stride[2] - g.padding[2];
        T** target = pixels.data;
        for (int64_t row = 0; row < g.kernel[0] * g.kernel[1]; ++row)
            for (int64_t c = start; c < start + g.kernel[2]; ++c)
                *target++ = rows.data[row] && c >= 0 && c < g.in[2] ? rows.data[row] + c * size : outside;
    }

    INLINE T* operator[](int64_t i) const { return pixels.data[i]; }
};

template <class T> void forward_pixels(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    const T* input = static_cast<const T*>(call.input);
    T* output = static_cast<T*>(call.result);
    const int64_t cells = g.cells(), rows = g.out[0] * g.out[1];
    parallel(call, g.batch * rows, g.out[2] * g.channels * cells, [&](int64_t begin, int64_t end) {
        Buffer<T> outside(g.channels);
        Taps<const T> taps(g, outside.data);
        fill(outside.data, g.channels, negative_infinity<T>());
        for (int64_t row = begin; row < end; ++row) {
            const T* sample = input + row / rows * g.in_size() * g.channels;
            taps.go_to_row(row % rows / g.out[1], row % g.out[1], [&](int64_t a, int64_t b) {
                return sample + (a * g.in[1] + b) * g.in[2] * g.channels;
            });
            T* out = output + row * g.out[2] * g.channels;
            auto finite = all_lanes<A>();
            with_cells(cells, [&](auto k) {
                for (int64_t x = 0; x < g.out[2]; ++x) {
                    taps.go_to(x, g.channels);
                    for_vectors<A, true>(g.channels, [&](int64_t c, int64_t count) {
                        auto pool = windows<A, decltype(k)::value>(
                            cells, [&](int64_t i) { return load(taps[i] + c, count); });
                        store(out + x * g.channels + c, count, pool.value());
                        finite &= is_finite<A>(pool.value()) | lanes_from<A>(count);
                    });
                }
            });
            if (!any(~finite)) continue;
            for (int64_t x = 0; x < g.out[2]; ++x) {
                taps.go_to(x, g.channels);
                for (int64_t c = 0; c < g.channels; ++c) {
                    T* cell = out + x * g.channels + c;
                    A value = load_one(cell);
                    if (value - value == 0) continue;
                    value = repaired<A>(cells, [&](int64_t i) { return load_one(taps[i] + c); });
                    store_one(cell, value);
                }
            }
        }
    });
}

// Windows that do not overlap write the gradient of their cells themselves.
template <class T> void backward_apart(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    const T *input = static_cast<const T*>(call.input), *grad_output = static_cast<const T*>(call.grad_output);
    T* grad_input = static_cast<T*>(call.result);
    const int64_t cells = g.cells(), rows = g.out[0] * g.out[1], size = g.in_size() * g.channels;
    const A slope = !call.detach_weights;
    if (!g.covers())
        parallel(call, g.batch, size, [&](int64_t begin, int64_t end) {
            memset(static_cast<void*>(grad_input + begin * size), 0, (end - begin) * size * sizeof(T));
        });
    parallel(call, g.batch * rows, 2 * g.out[2] * g.channels * cells, [&](int64_t begin, int64_t end) {
        Buffer<T> outside(g.channels), nowhere(g.channels);
        Taps<const T> taps(g, outside.data);
        Taps<T> targets(g, nowhere.data);
        fill(outside.data, g.channels, negative_infinity<T>());
        for (int64_t row = begin; row < end; ++row) {
            const int64_t oa = row % rows / g.out[1], ob = row % g.out[1];
            auto begin_of_row = [&](int64_t a, int64_t b) {
                return row / rows * size + (a * g.in[1] + b) * g.in[2] * g.channels;
            };
            taps.go_to_row(oa, ob, [&](int64_t a, int64_t b) { return input + begin_of_row(a, b); });
            targets.go_to_row(oa, ob, [&](int64_t a, int64_t b) { return grad_input + begin_of_row(a, b); });
            const T* grad_row = grad_output + row * g.out[2] * g.channels;
            with_cells(cells, [&](auto k) {
                constexpr int K = decltype(k)::value;
                for (int64_t x = 0; x < g.out[2]; ++x) {
                    taps.go_to(x, g.channels);
                    targets.go_to(x, g.channels);
                    for_vectors<A, true>(g.channels, [&](int64_t c, int64_t count) {
                        auto pool = windows<A, K>(
                            cells, [&](int64_t i) { return load(taps[i] + c, count); });
                        Vec<A> grad = load(grad_row + x * g.channels + c, count);
                        pool.gradients(grad, slope, [&](int64_t i, Vec<A> value) {
                            store(targets[i] + c, count, value);
                        });
                    });
                }
            });
        }
    });
}

// Overlapping windows add to rows of sums, in slots that are used in turn, for one sample and some of the channels.
template <class T> void backward_overlapping(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    const T *input = static_cast<const T*>(call.input), *grad_output = static_cast<const T*>(call.grad_output);
    T* grad_input = static_cast<T*>(call.result);
    const int64_t cells = g.cells(), pixels_of_row = g.in[1] * g.in[2];
    const A slope = !call.detach_weights;
    // Sums that stay in the cache, and a task for each thread.
    const int64_t cached = (1 << 17) / (g.kernel[0] * pixels_of_row), shared = g.channels * g.batch / call.threads;
    const int64_t tile = round_up(larger(smaller(smaller(cached, shared), g.channels), 1), lanes<A>);
    const int64_t tiles = (g.channels + tile - 1) / tile;
    parallel(call, g.batch * tiles, 2 * g.in_size() * tile, [&](int64_t begin, int64_t end) {
        // Not a multiple of a page, for the loads of a row would then wait for the stores to the row before.
        const int64_t row_size = pixels_of_row * tile + 5 * lanes<A>;
        Buffer<T> outside(g.channels);
        Buffer<A> sums(g.kernel[0] * row_size), nowhere(tile);
        Taps<const T> taps(g, outside.data);
        Taps<A> targets(g, nowhere.data);
        fill(outside.data, g.channels, negative_infinity<T>());
        fill<A>(nowhere.data, tile, 0);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % tiles * tile, channels = smaller(tile, g.channels - first);
            const T* sample = input + task / tiles * g.in_size() * g.channels + first;
            const T* grad_out = grad_output + task / tiles * g.out_size() * g.channels + first;
            T* grad_in = grad_input + task / tiles * g.in_size() * g.channels + first;
            int64_t loaded = 0, done = 0;
            for (int64_t oa = 0; oa < g.out[0]; ++oa) {
                const int64_t start = oa * g.stride[0] - g.padding[0], stop = smaller(start + g.kernel[0], g.in[0]);
                for (loaded = larger(loaded, start); loaded < stop; ++loaded)
                    fill<A>(sums.data + loaded % g.kernel[0] * row_size, row_size, 0);
                for (int64_t ob = 0; ob < g.out[1]; ++ob) {
                    taps.go_to_row(oa, ob, [&](int64_t a, int64_t b) {
                        return sample + (a * g.in[1] + b) * g.in[2] * g.channels;
                    });
                    targets.go_to_row(oa, ob, [&](int64_t a, int64_t b) {
                        return sums.data + a % g.kernel[0] * row_size + b * g.in[2] * tile;
                    });
                    with_cells(cells, [&](auto k) {
                        for (int64_t x = 0; x < g.out[2]; ++x, grad_out += g.channels) {
                            taps.go_to(x, g.channels);
                            targets.go_to(x, tile);
                            for_vectors<A, false>(channels, [&](int64_t c, int64_t count) {
                                auto pool = windows<A, decltype(k)::value>(
                                    cells, [&](int64_t i) { return load(taps[i] + c, count); });
                                pool.gradients(load(grad_out + c, count), slope, [&](int64_t i, Vec<A> value) {
                                    A* sum = targets[i] + c;
                                    store(sum, load(sum) + value);
                                });
                            });
                        }
                    });
                }
                // Rows above the next window are complete; those that no window has reached have gradient 0.
                const int64_t next = oa + 1 < g.out[0] ? smaller(start + g.stride[0], g.in[0]) : g.in[0];
                for (; done < next; ++done)
                    for (int64_t i = 0; i < pixels_of_row; ++i) {
                        T* pixel = grad_in + (done * pixels_of_row + i) * g.channels;
                        const A* sum = sums.data + done % g.kernel[0] * row_size + i * tile;
                        for_vectors<A, false>(channels, [&](int64_t c, int64_t count) {
                            store(pixel + c, count, done < stop ? load(sum + c) : Vec<A>{});
                        });
                    }
            }
        }
    });
}

template <class T> void backward_pixels(const Call& call) {
    return call.geometry.overlaps() ? backward_overlapping<T>(call) : backward_apart<T>(call);
}

}  // namespace SOFT_POOL_ISA
