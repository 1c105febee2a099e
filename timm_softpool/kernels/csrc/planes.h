// SoftPool of contiguous maps, one plane (sample and channel) after the other, in blocks of few rows of the first axis.
#pragma once
#include "pairs.h"

namespace SOFT_POOL_ISA {

// How the rows under some successive windows of the first axis are kept: apart by the phase of the stride.
//
// Along each axis, cell x = i * stride + p - padding is number i of phase p. The cells of each phase lie together, so
// that from one window to the next every tap moves by one number, and one loop pools the block: tap t of window j is
// number `tap(t) + j`. At the end of its rows the loop meets windows that nobody asked for.
struct Block {
    const Geometry& g;
    int64_t phases[3];   // that a window touches
    int64_t size[3];     // numbers of a phase
    int64_t rows;        // windows along the first axis
    int64_t windows;     // in all, with those between the rows
    int64_t phase_size;  // from one phase to the next

    INLINE Block(const Geometry& g, int64_t lanes) : g(g) {
        for (int axis = 0; axis < 3; ++axis) {
            phases[axis] = smaller(g.kernel[axis], g.stride[axis]);
            size[axis] = larger(g.out[axis] + (g.kernel[axis] - 1) / g.stride[axis],
                                (g.in[axis] + g.padding[axis] + g.stride[axis] - 1) / g.stride[axis]);
        }
        constexpr int64_t cached = 1 << 12;
        rows = cached / (phases[0] * phases[1] * phases[2] * size[1] * size[2]) + 1;
        rows = smaller(rows, g.out[0]);
        size[0] = rows + (g.kernel[0] - 1) / g.stride[0];
        windows = round_up(((rows - 1) * size[1] + g.out[1] - 1) * size[2] + g.out[2], lanes);
        phase_size = round_up(size[0] * size[1] * size[2] + lanes, lanes);
    }

    int64_t numbers() const { return phases[0] * phases[1] * phases[2] * phase_size; }

    INLINE int64_t number(int64_t pa, int64_t pb, int64_t pc, int64_t a, int64_t b, int64_t c) const {
        return ((pa * phases[1] + pb) * phases[2] + pc) * phase_size + (a * size[1] + b) * size[2] + c;
    }

    void find_taps(int64_t* taps) const {
        const int64_t *k = g.kernel, *s = g.stride;
        for (int64_t a = 0; a < k[0]; ++a)
            for (int64_t b = 0; b < k[1]; ++b)
                for (int64_t c = 0; c < k[2]; ++c)
                    *taps++ = number(a % s[0], b % s[1], c % s[2], a / s[0], b / s[1], c / s[2]);
    }

    // Calls `body(a, b, i)` for the rows `begin` <= number < `end` of the first axis, when the block's first window is
    // `first`: row (a, b) of the plane, inside it or, along the first axis, not, is kept from number i on.
    template <class F> INLINE void for_rows(int64_t first, int64_t begin, int64_t end, F body) const {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t pa = 0; pa < phases[0]; ++pa)
                for (int64_t pb = 0; pb < phases[1]; ++pb)
                    for (int64_t j = 0, b = pb - g.padding[1]; b < g.in[1]; ++j, b += g.stride[1])
                        if (b >= 0) body((first + i) * g.stride[0] + pa - g.padding[0], b, number(pa, pb, 0, i, j, 0));
    }
};

// Between a row of the plane and its numbers: vector by vector with a stride of 2, otherwise by way of a row of A with
// its padding, which is -inf, around.
template <class T, class A> struct Row {
    const Block& block;
    const int64_t stride, phases, numbers, padding, size;
    const int64_t from, to;  // numbers whose cells of both phases of stride 2 lie inside the plane
    Buffer<A> padded;

    explicit Row(const Block& block)
        : block(block), stride(block.g.stride[2]), phases(block.phases[2]), numbers(block.size[2]),
          padding(block.g.padding[2]), size(block.g.in[2]),
          from((padding + 1) / 2), to((size + padding) / 2), padded((numbers + lanes<A>) * larger(stride, 2)) {
        fill(padded.data, (numbers + lanes<A>) * larger(stride, 2), negative_infinity<A>());
    }

    INLINE bool paired() const { return stride == 2 && phases == 2 && to - from >= lanes<A>; }

    // Calls `pair(x, i)` for two vectors of cells from x on, whose numbers in both phases begin with i, then
    // `one(x, i)` for the first and last cells that have no pair.
    template <class Pair, class One> INLINE void for_pairs(Pair pair, One one) const {
        for_vectors<A, true>(to - from, [&](int64_t i, int64_t) { pair((from + i) * 2 - padding, from + i); });
        if (padding % 2) one(0, block.phase_size + from - 1);
        if ((size + padding) % 2) one(size - 1, to);
    }

    // Two vectors of cells -> a vector of each phase, and back.
    template <class S> INLINE void split_pair(const S* cells, A* target) const {
        Vec<A> even, odd;
        unzip<A>(load(cells), load(cells + lanes<A>), even, odd);
        store(target, even);
        store(target + block.phase_size, odd);
    }
    template <class S> INLINE void join_pair(const A* source, S* cells) const {
        Vec<A> low, high;
        zip<A>(load(source), load(source + block.phase_size), low, high);
        store(cells, low);
        store(cells + lanes<A>, high);
    }

    // May write -inf behind the row, where the next one begins; rows are split in their order.
    INLINE void split(const T* row, A* target) const {
        if (paired())
            return for_pairs([&](int64_t x, int64_t i) {
                split_pair(row + x, target + i);
            }, [&](int64_t x, int64_t i) { target[i] = load_one(row + x); });
        for_vectors<A, true>(size, [&](int64_t x, int64_t n) { store(padded.data + padding + x, n, load(row + x, n)); });
        if (stride == 2 && phases == 2) {
            for (int64_t i = 0; i < numbers; i += lanes<A>) split_pair(padded.data + 2 * i, target + i);
        } else if (stride == 1) {
            for (int64_t i = 0; i < numbers; i += lanes<A>) store(target + i, load(padded.data + i));
        } else {
            for (int64_t p = 0; p < phases; ++p)
                for (int64_t i = 0; i < numbers; ++i) target[p * block.phase_size + i] = padded.data[i * stride + p];
        }
    }

    // The inverse; 0 in cells of no phase.
    INLINE void join(const A* source, T* row, A* buffer) const {
        if (paired())
            return for_pairs([&](int64_t x, int64_t i) {
                join_pair(source + i, row + x);
            }, [&](int64_t x, int64_t i) { store_one(row + x, source[i]); });
        if (stride == 2 && phases == 2) {
            for (int64_t i = 0; i < numbers; i += lanes<A>) join_pair(source + i, buffer + 2 * i);
        } else {
            for (int64_t i = 0; i < numbers; ++i)
                for (int64_t p = 0; p < stride; ++p)
                    buffer[i * stride + p] = p < phases ? source[p * block.phase_size + i] : 0;
        }
        for_vectors<A, true>(size, [&](int64_t x, int64_t n) { store(row + x, n, load(buffer + padding + x, n)); });
    }
};

// Calls `body(out, i)` for the rows of windows of a block: the place of the first in the output, and its number.
template <class F> INLINE void for_windows(const Block& block, int64_t first, F body) {
    const Geometry& g = block.g;
    for (int64_t a = 0; a < smaller(block.rows, g.out[0] - first); ++a)
        for (int64_t b = 0; b < g.out[1]; ++b)
            body(((first + a) * g.out[1] + b) * g.out[2], (a * block.size[1] + b) * block.size[2]);
}

// Fills `numbers` with the rows of the block whose first window is `first`. Cells outside the plane along the second
// and third axis are -inf from the beginning.
template <class T, class A>
INLINE void load_rows(const Block& block, const Row<T, A>& row, const T* plane, int64_t first, A* numbers) {
    const Geometry& g = block.g;
    block.for_rows(first, 0, block.size[0], [&](int64_t a, int64_t b, int64_t i) {
        if (a >= 0 && a < g.in[0]) return row.split(plane + (a * g.in[1] + b) * g.in[2], numbers + i);
        for (int64_t p = 0; p < block.phases[2]; ++p)
            fill(numbers + i + p * block.phase_size, block.size[2], negative_infinity<A>());
    });
}

template <class T> void forward_planes(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    if (is_pairs<A>(g)) return forward_pairs<T>(call);
    const Block block(g, lanes<A>);
    const int64_t cells = g.cells();
    parallel(call, g.batch * g.channels, g.in_size(), [&](int64_t begin, int64_t end) {
        const Row<T, A> row(block);
        Buffer<A> numbers(block.numbers()), result(block.windows);
        Buffer<int64_t> taps(cells);
        block.find_taps(taps.data);
        fill(numbers.data, block.numbers(), negative_infinity<A>());
        for (int64_t plane = begin; plane < end; ++plane) {
            const T* input = static_cast<const T*>(call.input) + plane * g.in_size();
            T* output = static_cast<T*>(call.result) + plane * g.out_size();
            for (int64_t first = 0; first < g.out[0]; first += block.rows) {
                load_rows(block, row, input, first, numbers.data);
                with_cells(cells, [&](auto k) {
                    for (int64_t j = 0; j < block.windows; j += lanes<A>)
                        store(result.data + j, windows<A, decltype(k)::value>(
                            cells, [&](int64_t i) { return load(numbers.data + taps.data[i] + j); }).value());
                });
                auto finite = all_lanes<A>();
                for_windows(block, first, [&](int64_t out, int64_t j) {
                    for_vectors<A, true>(g.out[2], [&](int64_t x, int64_t n) {
                        Vec<A> value = load(result.data + j + x, n);
                        finite &= is_finite<A>(value) | lanes_from<A>(n);
                        store(output + out + x, n, value);
                    });
                });
                if (!any(~finite)) continue;
                for_windows(block, first, [&](int64_t out, int64_t j) {
                    for (int64_t x = j; x < j + g.out[2]; ++x)
                        if (!(result.data[x] - result.data[x] == 0))
                            store_one(output + out + x - j, repaired<A>(
                                cells, [&](int64_t i) { return numbers.data[taps.data[i] + x]; }));
                });
            }
        }
    });
}

template <class T> void backward_planes(const Call& call) {
    using A = Accumulate<T>;
    const Geometry& g = call.geometry;
    if (is_pairs<A>(g) && !g.overlaps()) return backward_pairs<T>(call);
    const Block block(g, lanes<A>);
    const int64_t cells = g.cells(), chunk = 16 * lanes<A>;
    const int64_t shared = (g.kernel[0] - 1) / g.stride[0];  // rows of numbers with the next block
    const bool overlaps = g.overlaps();
    const A slope = !call.detach_weights;
    parallel(call, g.batch * g.channels, 2 * g.in_size(), [&](int64_t begin, int64_t end) {
        const Row<T, A> row(block);
        Buffer<A> numbers(block.numbers()), sums(block.numbers()), grads(block.windows);
        Buffer<A> joined((row.numbers + lanes<A>) * larger(row.stride, 2));
        Buffer<A> parts(overlaps ? cells * chunk : 0);
        Buffer<int64_t> taps(cells);
        block.find_taps(taps.data);
        fill(numbers.data, block.numbers(), negative_infinity<A>());
        fill<A>(grads.data, block.windows, 0);
        fill<A>(sums.data, block.numbers(), 0);
        for (int64_t plane = begin; plane < end; ++plane) {
            const T* input = static_cast<const T*>(call.input) + plane * g.in_size();
            const T* grad_output = static_cast<const T*>(call.grad_output) + plane * g.out_size();
            T* grad_input = static_cast<T*>(call.result) + plane * g.in_size();
            if (!g.covers()) memset(static_cast<void*>(grad_input), 0, g.in_size() * sizeof(T));
            for (int64_t first = 0; first < g.out[0]; first += block.rows) {
                const int64_t rows = smaller(block.rows, g.out[0] - first);
                load_rows(block, row, input, first, numbers.data);
                if (rows < block.rows) fill<A>(grads.data, block.windows, 0);
                for_windows(block, first, [&](int64_t out, int64_t j) {
                    for_vectors<A, true>(g.out[2], [&](int64_t x, int64_t n) {
                        store(grads.data + j + x, n, load(grad_output + out + x, n));
                    });
                });
                with_cells(cells, [&](auto k) {
                    for (int64_t start = 0; start < block.windows; start += chunk) {
                        const int64_t stop = smaller(start + chunk, block.windows);
                        for (int64_t j = start; j < stop; j += lanes<A>) {
                            auto pool = windows<A, decltype(k)::value>(
                                cells, [&](int64_t i) { return load(numbers.data + taps.data[i] + j); });
                            pool.gradients(load(grads.data + j), slope, [&](int64_t i, Vec<A> value) {
                                store(overlaps ? parts.data + i * chunk + j - start : sums.data + taps.data[i] + j,
                                      value);
                            });
                        }
                        for (int64_t i = 0; i < cells && overlaps; ++i)
                            for (int64_t j = start; j < stop; j += lanes<A>) {
                                A* sum = sums.data + taps.data[i] + j;
                                store(sum, load(sum) + load(parts.data + i * chunk + j - start));
                            }
                    }
                });
                // Rows above the next block are complete; what the others have so far, the next block goes on with.
                const bool last = first + rows == g.out[0];
                block.for_rows(first, 0, last ? rows + shared : rows, [&](int64_t a, int64_t b, int64_t i) {
                    if (a >= 0 && a < g.in[0])
                        row.join(sums.data + i, grad_input + (a * g.in[1] + b) * g.in[2], joined.data);
                });
                const int64_t kept = last ? 0 : shared * block.size[1] * block.size[2];
                for (int64_t i = 0; i < block.numbers() && overlaps; i += block.phase_size) {
                    memmove(sums.data + i, sums.data + i + rows * block.size[1] * block.size[2], kept * sizeof(A));
                    fill<A>(sums.data + i + kept, block.phase_size - kept, 0);
                }
            }
        }
    });
}

}  // namespace SOFT_POOL_ISA
