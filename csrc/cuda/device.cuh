// What all kernels share: types of 16 bits, four entries at a time, a warp's reductions, launches.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef FASTCLIP_EMULATED
#include "tests/cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "fastclip/cuda_epilogues.h"

namespace fastclip {
namespace cuda {

constexpr int LANES = 32, THREADS = WARPS * LANES;
// A lane's part of a piece, whose rows are dealt to the warps and its columns to the lanes.
constexpr int R = TILE_ROWS / WARPS, C = TILE_COLUMNS / LANES;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline __device__ int lane_index() { return threadIdx.x % LANES; }
inline __device__ int warp_index() { return threadIdx.x / LANES; }

// -inf stands for a line without entries, and -inf - -inf would be NaN.
inline __device__ float finite(float anchor) { return anchor == -INFINITE ? 0.0f : anchor; }

constexpr float LOG2E = 1.44269504f;

// 2^x, 0 where that is below 2^-126: one instruction, where __expf has four for what is below.
inline __device__ float power_of_two(float x) {
#ifdef FASTCLIP_EMULATED
    return emulation::power_of_two(x);
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}
inline __device__ float exponential(float x) { return power_of_two(x * LOG2E); }
// exp(x - anchor), the difference rounded once
inline __device__ float exponential(float x, float anchor) {
    return power_of_two(fmaf(x, LOG2E, -anchor * LOG2E));
}

template <class T>
struct alignas(C * sizeof(T)) Vector {
    T entry[C];
};

// Whether rows of a matrix begin where vectors may.
template <class T>
__device__ bool aligned(const T* data, int64_t stride) {
    return (reinterpret_cast<uintptr_t>(data) | stride * sizeof(T)) % sizeof(Vector<T>) == 0;
}

// C entries in float32, or the first `count` of them and zeros.
template <class T>
__device__ void load(const T* from, int count, bool vectors, float (&v)[C]) {
    if (vectors) {
        const Vector<T> loaded = *reinterpret_cast<const Vector<T>*>(from);
        for (int c = 0; c < C; ++c) v[c] = static_cast<float>(loaded.entry[c]);
    } else {
        for (int c = 0; c < C; ++c) v[c] = c < count ? static_cast<float>(from[c]) : 0.0f;
    }
}

// Into global memory.
template <class T>
__device__ void store(T* to, int count, bool vectors, const float (&v)[C]) {
    if (vectors) {
        Vector<T> rounded;
        for (int c = 0; c < C; ++c) rounded.entry[c] = static_cast<T>(v[c]);
        // one store, said outright: of an assignment nvcc makes C where rows are unrolled
        std::conditional_t<sizeof rounded == sizeof(uint4), uint4, uint2> bits;
        memcpy(&bits, &rounded, sizeof rounded);
        __stwb(reinterpret_cast<decltype(bits)*>(to), bits);
    } else {
        for (int c = 0; c < C; ++c)
            if (c < count) to[c] = static_cast<T>(v[c]);
    }
}

// NaN is passed over here; sums of exponentials show it.
struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Smaller {
    __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Plus {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// Over all lanes, in every lane.
template <class Combine>
__device__ float over_lanes(float value, Combine combine) {
    for (int away = LANES / 2; away; away /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, away));
    return value;
}

// R lines over all lanes: line `own_line()` in each lane. The lanes halve the lines between them
// three times, which takes nine exchanges where R reductions would take forty.
template <class Combine>
__device__ float lines_over_lanes(float (&line)[R], Combine combine) {
    static_assert(R == 8 && LANES == 32, "three halvings, then four lanes a line");
    const int lane = lane_index();
    for (int half = R / 2, away = LANES / 2; half; half /= 2, away /= 2) {
        const bool upper = lane & away;
        for (int k = 0; k < half; ++k) {
            const float given = upper ? line[k] : line[k + half];
            const float kept = upper ? line[k + half] : line[k];
            line[k] = combine(kept, __shfl_xor_sync(ALL_LANES, given, away));
        }
    }
    line[0] = combine(line[0], __shfl_xor_sync(ALL_LANES, line[0], 2));
    return combine(line[0], __shfl_xor_sync(ALL_LANES, line[0], 1));
}

constexpr int LANES_A_LINE = LANES / R;
inline __device__ int own_line() { return lane_index() / LANES_A_LINE; }
inline __device__ float of_line(float own, int line) {
    return __shfl_sync(ALL_LANES, own, line * LANES_A_LINE);
}

// Queue `blocks` thread blocks of a kernel.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, void* stream,
            Arguments... arguments) {
    if (blocks == 0) return;
    if (blocks > INT32_MAX)
        throw std::runtime_error(std::string(name) + ": " + std::to_string(blocks) +
                                 " thread blocks, CUDA's limit is 2147483647");
#ifdef FASTCLIP_EMULATED
    (void)stream;
    emulation::run(static_cast<unsigned>(blocks), THREADS, [=] { kernel(arguments...); });
#else
    kernel<<<static_cast<unsigned>(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        arguments...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        // it may be an earlier one's, which is only now known
        throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error) +
                                 "; an earlier kernel may have failed: CUDA_LAUNCH_BLOCKING=1 "
                                 "says which");
#endif
}

}  // namespace cuda
}  // namespace fastclip
