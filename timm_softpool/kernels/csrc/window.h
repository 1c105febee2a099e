// SoftPool of one window in every lane of a vector.
#pragma once
#include "vectors.h"

namespace SOFT_POOL_ISA {

// out = m + sum w_i (x_i - m) / sum w_i with w_i = exp(x_i - m) and m = max x_i. `tap(i)` loads the i-th cells.
// Where a window holds NaN or an infinite maximum, `mean` is not finite, and the gradient 0; `repaired` gives its value.
// K is the number of cells if it is known to the compiler, which then keeps them in registers; 0 otherwise.
template <class A, int K, class Tap> struct Windows {
    static constexpr int kept = K ? K : 1;
    static constexpr A ln_2 = 0.69314718055994531;

    int64_t cells;
    Tap tap;
    Vec<A> max, share, mean;             // share = 1 / sum w_i; mean of what `above` gives, weighted
    Vec<A> exponents[kept], weights[kept];

    // (x - m) / ln 2, whose power of two is exp(x - m). That of -inf is finite, for 0 * -inf is not 0; NaN stays NaN.
    INLINE Vec<A> above(Vec<A> x) const {
        Vec<A> lowest = broadcast<A>(Float<A>::lowest), exponent = (x - max) * A(1.4426950408889634);
        HIDE(lowest);
        return lowest > exponent ? lowest : exponent;
    }

    INLINE Windows(int64_t cells, Tap tap) : cells(cells), tap(tap) {
        if (K) {
            UNROLL for (int i = 0; i < kept; ++i) exponents[i] = tap(i);
            max = exponents[0];
            UNROLL for (int i = 1; i < kept; ++i) max = exponents[i] > max ? exponents[i] : max;
            UNROLL for (int i = 0; i < kept; ++i) exponents[i] = above(exponents[i]);
            constexpr int group = !K ? 1 : K % 4 == 0 ? 4 : K % 3 == 0 ? 3 : K;  // as many as the registers hold
            UNROLL for (int i = 0; i < K; i += group) exp2<A, group>(exponents + i, weights + i);
            Vec<A> total = weights[0];
            mean = weights[0] * exponents[0];
            UNROLL for (int i = 1; i < kept; ++i) {
                total += weights[i];
                mean += weights[i] * exponents[i];
            }
            share = 1 / total;
        } else {
            max = tap(0);
            for (int64_t i = 1; i < cells; ++i) {
                Vec<A> x = tap(i);
                max = x > max ? x : max;
            }
            Vec<A> total{};
            mean = total;
            for (int64_t i = 0; i < cells; ++i) {
                Vec<A> exponent = above(tap(i)), weight;
                exp2<A, 1>(&exponent, &weight);
                total += weight;
                mean += weight * exponent;
            }
            share = 1 / total;
        }
        mean *= share;
    }

    INLINE Vec<A> value() const { return max + mean * ln_2; }

    // Calls `body(i, gradient)` for each cell: d out / d x_i * grad = w_i / sum w * (1 + slope * (x_i - out)) * grad.
    template <class F> INLINE void gradients(Vec<A> grad, A slope, F body) const {
        const Vec<A> scale = grad * share;
        const Mask<A> finite = is_finite<A>(mean);
        auto gradient = [&](Vec<A> exponent, Vec<A> weight) {
            Vec<A> factor = 1 + slope * ln_2 * (exponent - mean);
            return bits<Vec<A>>(bits<Mask<A>>(weight * scale * factor) & finite);
        };
        if (K) {
            UNROLL for (int i = 0; i < kept; ++i) body(i, gradient(exponents[i], weights[i]));
        } else {
            for (int64_t i = 0; i < cells; ++i) {
                Vec<A> exponent = above(tap(i)), weight;
                exp2<A, 1>(&exponent, &weight);
                body(i, gradient(exponent, weight));
            }
        }
    }
};

template <class A, int K, class Tap> INLINE Windows<A, K, Tap> windows(int64_t cells, Tap tap) {
    return {cells, tap};
}

// The value of a window that holds NaN or an infinite maximum.
template <class A, class Cell> inline A repaired(int64_t cells, Cell cell) {
    A max = cell(0);
    for (int64_t i = 0; i < cells; ++i) {
        A x = cell(i);
        if (x != x) return x;
        max = x > max ? x : max;
    }
    return max;
}

template <int K> struct Cells { static constexpr int value = K; };

// Calls `body(Cells<K>)` with K the number of a window's cells, 0 for numbers that have no code of their own.
template <class F> INLINE void with_cells(int64_t cells, F body) {
    switch (cells) {
        case 2: return body(Cells<2>{});
        case 3: return body(Cells<3>{});
        case 4: return body(Cells<4>{});
        case 8: return body(Cells<8>{});
        case 9: return body(Cells<9>{});
        default: return body(Cells<0>{});
    }
}

}  // namespace SOFT_POOL_ISA
