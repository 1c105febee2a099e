// Vectors of one instruction set: loads and stores of every dtype, and the exponential.
// Included once for each instruction set, in its own namespace; no function of a standard library may be inlined
// here, for the linker could then give the AVX-512 copy of it to every caller.
#pragma once
#include "geometry.h"

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// Hides from the compiler that a vector is constant: GCC takes two instructions for the maximum of such a one.
#if defined(__x86_64__)
#define HIDE(vector) asm("" : "+v"(vector))
#else
#define HIDE(vector)
#endif

namespace SOFT_POOL_ISA {

template <class A> using Vec __attribute__((vector_size(SOFT_POOL_BYTES))) = A;
template <class A> constexpr int64_t lanes = SOFT_POOL_BYTES / sizeof(A);

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// T is how numbers are stored, Accumulate<T> how they are computed with.
template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> struct Accumulator<const T> : Accumulator<T> {};
template <class T> using Accumulate = typename Accumulator<T>::type;

template <class A> struct Float;
template <> struct Float<float> {
    using Int = int32_t;
    static constexpr int mantissa = 23;
    static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the lowest bits
    static constexpr float lowest = -127.f;     // the first exponent whose power of two counts as 0
    // (2^f - 1) / f for -1/2 <= f <= 1/2, fitted for the smallest largest relative error of 2^f, 1e-7
    static constexpr float exp2[] = {6.931469776e-01f, 2.402224209e-01f, 5.550733744e-02f, 9.671512649e-03f,
                                     1.326472707e-03f};
};
template <> struct Float<double> {
    using Int = int64_t;
    static constexpr int mantissa = 52;
    static constexpr double round = 6755399441055744.;
    static constexpr double lowest = -1023.;
    // ln(2)^k / k! for k = 1, 2, ...: what is left out is below 1e-17
    static constexpr double exp2[] = {
        6.9314718055994529e-01, 2.4022650695910072e-01, 5.5504108664821580e-02, 9.6181291076284772e-03,
        1.3333558146428443e-03, 1.5403530393381610e-04, 1.5252733804059840e-05, 1.3215486790144309e-06,
        1.0178086009239699e-07, 7.0549116208011233e-09, 4.4455382718708116e-10, 2.5678435993488206e-11,
        1.3691488853904129e-12};
};

template <class To, class From> INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

template <class A> INLINE Vec<A> broadcast(A value) { return Vec<A>{} + value; }

// All bits of a lane are set where something holds.
template <class A> using Mask = Vec<typename Float<A>::Int>;
template <class A> INLINE Mask<A> is_finite(Vec<A> x) { return x - x == 0; }
template <class A> INLINE Mask<A> all_lanes() { return ~Mask<A>{}; }
template <class A> INLINE Mask<A> lanes_from(int64_t n) {
    Mask<A> mask{};
    for (int64_t i = n; i < lanes<A>; ++i) mask[i] = -1;
    return mask;
}

template <class Int> INLINE bool any(Int mask) {
    uint64_t parts[sizeof(Int) / 8], all = 0;
    memcpy(parts, &mask, sizeof(Int));
    for (uint64_t part : parts) all |= part;
    return all != 0;
}

// 2^x for lowest <= x <= 0, to 2 units in the last place; at `lowest` exactly 0, for there the exponent's bits are 0.
// Of n vectors step by step, so that no step waits for the one before.
template <class A, int n> INLINE void exp2(const Vec<A>* x, Vec<A>* result) {
    using F = Float<A>;
    Vec<A> rounded[n], f[n], power[n];
    constexpr int degree = sizeof(F::exp2) / sizeof(A);
    UNROLL for (int i = 0; i < n; ++i) rounded[i] = x[i] + F::round;
    UNROLL for (int i = 0; i < n; ++i) f[i] = x[i] - (rounded[i] - F::round);
    UNROLL for (int i = 0; i < n; ++i) power[i] = F::exp2[degree - 1] * f[i] + F::exp2[degree - 2];
    UNROLL for (int k = degree - 3; k >= 0; --k)
        UNROLL for (int i = 0; i < n; ++i) power[i] = power[i] * f[i] + F::exp2[k];
    UNROLL for (int i = 0; i < n; ++i) power[i] = power[i] * f[i] + 1;
    UNROLL for (int i = 0; i < n; ++i)
        result[i] = bits<Vec<A>>(bits<Mask<A>>(power[i]) + (bits<Mask<A>>(rounded[i]) << F::mantissa));
}

// Every second number of a pair of vectors, from the first or the second on; and the inverse.
#if defined(__clang__)
template <class A> INLINE void unzip(Vec<A> a, Vec<A> b, Vec<A>& even, Vec<A>& odd) {
    for (int64_t i = 0; i < lanes<A>; ++i) {
        even[i] = 2 * i < lanes<A> ? a[2 * i] : b[2 * i - lanes<A>];
        odd[i] = 2 * i < lanes<A> ? a[2 * i + 1] : b[2 * i + 1 - lanes<A>];
    }
}
template <class A> INLINE void zip(Vec<A> even, Vec<A> odd, Vec<A>& a, Vec<A>& b) {
    for (int64_t i = 0; i < lanes<A>; ++i) {
        a[i] = (i % 2 ? odd : even)[i / 2];
        b[i] = (i % 2 ? odd : even)[(i + lanes<A>) / 2];
    }
}
#else
template <class A> INLINE void unzip(Vec<A> a, Vec<A> b, Vec<A>& even, Vec<A>& odd) {
    Mask<A> index;
    UNROLL for (int64_t i = 0; i < lanes<A>; ++i) index[i] = 2 * i;
    even = __builtin_shuffle(a, b, index);
    odd = __builtin_shuffle(a, b, index + 1);
}
template <class A> INLINE void zip(Vec<A> even, Vec<A> odd, Vec<A>& a, Vec<A>& b) {
    Mask<A> index;
    UNROLL for (int64_t i = 0; i < lanes<A>; ++i) index[i] = i / 2 + i % 2 * lanes<A>;
    a = __builtin_shuffle(even, odd, index);
    b = __builtin_shuffle(even, odd, index + lanes<A> / 2);
}
#endif

INLINE Vec<float> load(const float* source) { Vec<float> v; memcpy(&v, source, sizeof(v)); return v; }
INLINE Vec<double> load(const double* source) { Vec<double> v; memcpy(&v, source, sizeof(v)); return v; }
INLINE void store(float* target, Vec<float> v) { memcpy(target, &v, sizeof(v)); }
INLINE void store(double* target, Vec<double> v) { memcpy(target, &v, sizeof(v)); }

using Bits16 __attribute__((vector_size(SOFT_POOL_BYTES / 2))) = uint16_t;
using Bits32 = Vec<uint32_t>;

template <class T> INLINE Bits32 load_bits(const T* source) {
    Bits16 half;
    memcpy(&half, source, sizeof(half));
    return __builtin_convertvector(half, Bits32);
}

template <class T> INLINE void store_bits(T* target, Bits32 value) {
    Bits16 half = __builtin_convertvector(value, Bits16);
    memcpy(target, &half, sizeof(half));
}

INLINE Vec<float> load(const Bfloat16* source) { return bits<Vec<float>>(load_bits(source) << 16); }

INLINE void store(Bfloat16* target, Vec<float> v) {
    Bits32 u = bits<Bits32>(v);
    Bits32 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // half to even
    store_bits(target, v == v ? rounded : Bits32{} + 0x7fc0);
}

// The exponent is moved by a multiplication, which is right for the numbers below 2^-14, too.
INLINE Vec<float> load(const Float16* source) {
    Bits32 u = load_bits(source), magnitude = u & 0x7fff;
    Bits32 number = bits<Bits32>(bits<Vec<float>>(magnitude << 13) * 0x1p112f);
    number |= magnitude >= 0x7c00 ? Bits32{} + 0x7f800000 : Bits32{};
    return bits<Vec<float>>(number | (u & 0x8000) << 16);
}

INLINE void store(Float16* target, Vec<float> v) {
    Bits32 u = bits<Bits32>(v), magnitude = u & 0x7fffffff;
    Bits32 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;  // half to even
    Bits32 small = bits<Bits32>(bits<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
    Bits32 number = magnitude < 0x38800000 ? small : normal;
    number = magnitude < 0x47800000 ? number : Bits32{} + 0x7c00;
    number = magnitude > 0x7f800000 ? Bits32{} + 0x7e00 : number;
    store_bits(target, number | (u >> 16 & 0x8000));
}

template <class T> INLINE T negative_infinity();
template <> INLINE float negative_infinity() { return -__builtin_inff(); }
template <> INLINE double negative_infinity() { return -__builtin_inf(); }
template <> INLINE Bfloat16 negative_infinity() { return {0xff80}; }
template <> INLINE Float16 negative_infinity() { return {0xfc00}; }

// The same for `count` numbers, at most as many as a vector holds; the others are -inf.
template <class T> INLINE Vec<Accumulate<T>> load(const T* source, int64_t count) {
    constexpr int64_t n = lanes<Accumulate<T>>;
    if (count == n) return load(source);
    T buffer[n];
    for (int64_t i = 0; i < n; ++i) buffer[i] = i < count ? source[i] : negative_infinity<T>();
    return load(buffer);
}

template <class T> INLINE void store(T* target, int64_t count, Vec<Accumulate<T>> v) {
    constexpr int64_t n = lanes<Accumulate<T>>;
    if (count == n) return store(target, v);
    T buffer[n];
    store(buffer, v);
    for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

template <class T> INLINE Accumulate<T> load_one(const T* source) { return load(source, 1)[0]; }
template <class T> INLINE void store_one(T* target, Accumulate<T> value) { store(target, 1, broadcast(value)); }
INLINE float load_one(const float* source) { return *source; }
INLINE void store_one(float* target, float value) { *target = value; }

// Calls `body(i, n)` for vectors of the numbers i .. i + n. The last may overlap the one before, where that does no
// harm; where it does, or there are fewer numbers than a vector holds, the last one is not full.
template <class A, bool overlap, class F> INLINE void for_vectors(int64_t count, F body) {
    int64_t i = 0;
    for (; i + lanes<A> <= count; i += lanes<A>) body(i, lanes<A>);
    if (i == count) return;
    if (overlap && count >= lanes<A>) body(count - lanes<A>, lanes<A>);
    else body(i, count - i);
}

// Memory of a thread, aligned to a vector.
template <class A> struct Buffer {
    A* data;

    explicit Buffer(int64_t size) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, (size + lanes<A>) * sizeof(A))) abort();
        data = static_cast<A*>(memory);
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

template <class A> INLINE void fill(A* target, int64_t count, A value) {
    for (int64_t i = 0; i < count; ++i) target[i] = value;
}

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// `body(begin, end)` for parts of `count` tasks that touch `cost` numbers each.
template <class F> INLINE void parallel(const Call& call, int64_t count, int64_t cost, F body) {
    int64_t grain = larger(1, 32768 / larger(1, cost));
    auto part = [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); };
    if (!call.parallel_for || count <= grain || call.parallel_for(0, count, grain, part, &body)) body(0, count);
}

}  // namespace SOFT_POOL_ISA
