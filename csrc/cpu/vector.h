// A vector of floats as wide as the instruction set this is compiled for, in the vector extensions
// of gcc and clang. Included by kernels.cpp alone; all of it has internal linkage, so that no
// function compiled for a new processor is linked where an old one would run it.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = FASTCLIP_LANES;
constexpr float INFINITE = __builtin_inff();

template <int N>
struct VectorOf {
    typedef float Floats __attribute__((vector_size(4 * N)));
    typedef int32_t Ints __attribute__((vector_size(4 * N)));
};
using Floats = VectorOf<LANES>::Floats;
using Ints = VectorOf<LANES>::Ints;

inline Floats all(float value) { return value - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

template <int N>
inline float add_lanes(typename VectorOf<N>::Floats v) {
    if constexpr (N == 2) {
        return v[0] + v[1];
    } else {
        typename VectorOf<N / 2>::Floats half[2];
        memcpy(half, &v, sizeof v);
        return add_lanes<N / 2>(half[0] + half[1]);
    }
}
inline float sum_of(Floats v) { return add_lanes<LANES>(v); }

template <int N>
inline float greatest_lane(typename VectorOf<N>::Floats v) {
    if constexpr (N == 2) {
        return v[0] > v[1] ? v[0] : v[1];
    } else {
        typename VectorOf<N / 2>::Floats half[2];
        memcpy(half, &v, sizeof v);
        return greatest_lane<N / 2>(half[0] > half[1] ? half[0] : half[1]);
    }
}
inline float max_of(Floats v) { return greatest_lane<LANES>(v); }

// How a loop's body reaches memory: a whole vector, or what is left at a line's end.
struct Whole {
    Floats load(const float* from) const {
        Floats v;
        memcpy(&v, from, sizeof v);
        return v;
    }
    void store(float* to, Floats v) const { memcpy(to, &v, sizeof v); }
    // v, with `other` in lanes beyond the end
    Floats inside(Floats v, float) const { return v; }
};

struct Rest {
    int count;
    Floats load(const float* from) const {
        Floats v{};
        memcpy(&v, from, sizeof(float) * count);
        return v;
    }
    void store(float* to, Floats v) const { memcpy(to, &v, sizeof(float) * count); }
    Floats inside(Floats v, float other) const {
        for (int lane = count; lane < LANES; ++lane) v[lane] = other;
        return v;
    }
};

template <class Body>
inline void along(int64_t count, Body&& body) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) body(j, Whole{});
    if (j < count) body(j, Rest{static_cast<int>(count - j)});
}

// exp(x) for x <= 88, relative error below 2e-7; 0 below the normal numbers and at -inf.
inline Floats exp(Floats x) {
    // x = n ln 2 + r; adding the shift rounds to n, and leaves n + 127 in the lowest bits
    constexpr float shift = 12582912.0f + 127.0f;
    const Floats shifted = x * 1.44269504088896341f + shift;
    const Floats n = shifted - shift;
    // ln 2 in two parts, the first short enough for exact multiples
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // the least relative error for these degrees, 4e-9
    Floats p = all(0.00138145941f);
    p = p * r + 0.00836871751f;
    p = p * r + 0.041668389f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Floats power = (Floats)((Ints)shifted << 23);
    return x < -87.336544f ? Floats{} : p * power;
}

// The same of any x: infinite from 88 on, NaN of NaN.
inline Floats exp_or_infinite(Floats x) {
    const Floats e = exp(x);
    return x > 88.0f ? all(INFINITE) : e;
}

// log(1 + e) for e in [0, 1], degree 8 at Chebyshev nodes: forming 1 + e would lose most bits of
// a small e.
inline Floats log1p(Floats e) {
    Floats p = all(0.005253457929939032f);
    p = p * e - 0.02958850748836994f;
    p = p * e + 0.07836166769266129f;
    p = p * e - 0.13674770295619965f;
    p = p * e + 0.19111430644989014f;
    p = p * e - 0.24844369292259216f;
    p = p * e + 0.33319270610809326f;
    p = p * e - 0.49999502301216125f;
    return (p * e + 1.0f) * e;
}

}  // namespace
