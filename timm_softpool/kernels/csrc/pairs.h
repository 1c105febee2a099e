// The commonest pool of contiguous maps: windows of two cells along the last axis, side by side, without padding.
// Their cells come out of pairs of vectors in registers, and go back into them, with no detour.
#pragma once
#include "window.h"

namespace SOFT_POOL_ISA {

template <class A> inline bool is_pairs(const Geometry& g) {
    const int64_t cells = g.cells();
    if (g.kernel[2] != 2 || g.stride[2] != 2 || g.out[2] < lanes<A> || (cells != 2 && cells != 4 && cells != 8))
        return false;
    for (int axis = 0; axis < 3; ++axis)
        if (g.padding[axis] || (g.out[axis] - 1) * g.stride[axis] + g.kernel[axis] > g.in[axis]) return false;
    return true;
}

// The rows of a plane under the windows of row (oa, ob), at most four.
template <class T> struct WindowRows {
    T* rows[4];

    INLINE WindowRows(const Geometry& g, T* plane, int64_t oa, int64_t ob) {
        int64_t i = 0;
        for (int64_t a = oa * g.stride[0]; a < oa * g.stride[0] + g.kernel[0]; ++a)
            for (int64_t b = ob * g.stride[1]; b < ob * g.stride[1] + g.kernel[1]; ++b)
                rows[i++] = plane + (a * g.in[1] + b) * g.in[2];
    }

    // The cells under tap i of the windows from x on.
    INLINE auto tap(int64_t i, int64_t x) const {
        using A = Accumulate<T>;
        Vec<A> even, odd;
        unzip<A>(load(rows[i / 2] + 2 * x), load(rows[i / 2] + 2 * x + lanes<A>), even, odd);
        return i % 2 ? odd : even;
    }
};

template <class T> void forward_pairs(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    const int64_t cells = g.cells();
    parallel(call, g.batch * g.channels, g.in_size(), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
            const T* input = static_cast<const T*>(call.input) + plane * g.in_size();
            T* output = static_cast<T*>(call.result) + plane * g.out_size();
            auto finite = all_lanes<A>();
            with_cells(cells, [&](auto k) {
                for (int64_t row = 0; row < g.out[0] * g.out[1]; ++row) {
                    const WindowRows<const T> rows(g, input, row / g.out[1], row % g.out[1]);
                    for_vectors<A, true>(g.out[2], [&](int64_t x, int64_t) {
                        auto pool = windows<A, decltype(k)::value>(cells, [&](int64_t i) { return rows.tap(i, x); });
                        store(output + row * g.out[2] + x, pool.value());
                        finite &= is_finite<A>(pool.value());
                    });
                }
            });
            if (!any(~finite)) continue;
            for (int64_t i = 0; i < g.out_size(); ++i) {
                const A value = load_one(output + i);
                if (value - value == 0) continue;
                const int64_t row = i / g.out[2], x = i % g.out[2];
                const WindowRows<const T> rows(g, input, row / g.out[1], row % g.out[1]);
                store_one(output + i, repaired<A>(
                    cells, [&](int64_t j) { return load_one(rows.rows[j / 2] + 2 * x + j % 2); }));
            }
        }
    });
}

// Of windows that do not overlap.
template <class T> void backward_pairs(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    const int64_t cells = g.cells();
    const A slope = !call.detach_weights;
    parallel(call, g.batch * g.channels, 2 * g.in_size(), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
            const T* input = static_cast<const T*>(call.input) + plane * g.in_size();
            const T* grad_output = static_cast<const T*>(call.grad_output) + plane * g.out_size();
            T* grad_input = static_cast<T*>(call.result) + plane * g.in_size();
            if (!g.covers()) memset(static_cast<void*>(grad_input), 0, g.in_size() * sizeof(T));
            with_cells(cells, [&](auto k) {
                constexpr int K = decltype(k)::value;
                for (int64_t row = 0; row < g.out[0] * g.out[1]; ++row) {
                    const WindowRows<const T> rows(g, input, row / g.out[1], row % g.out[1]);
                    const WindowRows<T> grads(g, grad_input, row / g.out[1], row % g.out[1]);
                    for_vectors<A, true>(g.out[2], [&](int64_t x, int64_t) {
                        auto pool = windows<A, K>(cells, [&](int64_t i) { return rows.tap(i, x); });
                        Vec<A> parts[K];
                        pool.gradients(load(grad_output + row * g.out[2] + x), slope,
                                       [&](int64_t i, Vec<A> value) { parts[i] = value; });
                        UNROLL for (int i = 0; i < K; i += 2) {
                            Vec<A> low, high;
                            zip<A>(parts[i], parts[i + 1], low, high);
                            store(grads.rows[i / 2] + 2 * x, low);
                            store(grads.rows[i / 2] + 2 * x + lanes<A>, high);
                        }
                    });
                }
            });
        }
    });
}

}  // namespace SOFT_POOL_ISA
