// CUDA's execution model on a CPU, as much of it as the kernels in csrc/cuda use: they compile as
// C++, and the threads of a block run as fibers that change at barriers and shuffles. Blocks run
// one after the other. Every second block starts its threads from the last, so that what depends
// on their order shows; a barrier that some threads never reach is an error.
#pragma once

#include <math.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)

namespace emulation {

struct Index {
    unsigned x;
};

// Threads that wait for each other.
struct Barrier {
    unsigned size, arrived = 0, passed = 0;
};

// Where a fiber continues.
#ifdef __x86_64__
using Context = void*;

// What a call preserves goes to the stack, and the stack is changed. glibc's swapcontext asks the
// kernel for the signal mask each time: half of all time here.
__attribute__((naked, noinline)) static void change(Context*, const Context*) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
        "mov %rsp, (%rdi); mov (%rsi), %rsp\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void begin(Context& context, char* stack, size_t bytes, void (*body)()) {
    // six registers, where to continue, and nowhere to return to; aligned as a call leaves it
    const uintptr_t end = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
    void** top = reinterpret_cast<void**>(end) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(body);
    context = top;
}
#else
using Context = ucontext_t;

inline void change(Context* from, const Context* to) {
    swapcontext(from, to);
}

inline void begin(Context& context, char* stack, size_t bytes, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    makecontext(&context, body, 0);
}
#endif

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    const Barrier* waits = nullptr;
    unsigned passed = 0;     // the barrier's count when the wait began
    unsigned exchanges = 0, votes = 0;  // of this thread, so far
    bool done = false;
};

constexpr unsigned LANES = 32;
constexpr size_t STACK_BYTES = 64 << 10;

struct Block {
    std::function<void()> kernel;
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<float> given[2];
    std::vector<int> votes[2];
    Barrier all;
    Fiber* running = nullptr;
    bool moved = false;
    Context home;
};

inline thread_local Block* block = nullptr;

}  // namespace emulation

inline thread_local emulation::Index threadIdx, blockIdx, gridDim;

namespace emulation {

inline void leave() {
    change(&block->running->context, &block->home);
}

inline void enter(Fiber& fiber) {
    block->running = &fiber;
    threadIdx.x = static_cast<unsigned>(&fiber - block->fibers.data());
    change(&block->home, &fiber.context);
}

inline void body() {
    block->kernel();
    block->running->done = block->moved = true;
    leave();
}

inline void wait(Barrier& barrier) {
    Fiber& self = *block->running;
    self.waits = &barrier;
    self.passed = barrier.passed;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.passed;
        block->moved = true;
    }
    while (barrier.passed == self.passed) leave();
    self.waits = nullptr;
}

// Two rows of slots take turns: who writes the next value is past the barrier that the readers of
// this one have reached.
inline float exchange(float value, unsigned lane) {
    const unsigned self = threadIdx.x, warp = self / LANES;
    std::vector<float>& given = block->given[block->running->exchanges++ % 2];
    given[self] = value;
    wait(block->warps[warp]);
    return given[warp * LANES + lane];
}

// One block's threads, until all are done.
inline void run_threads(bool backwards) {
    const size_t count = block->fibers.size();
    for (size_t done = 0; done < count;) {
        done = 0;
        block->moved = false;
        for (size_t i = 0; i < count; ++i) {
            Fiber& fiber = block->fibers[backwards ? count - 1 - i : i];
            const bool waits = fiber.waits && fiber.waits->passed == fiber.passed;
            if (!fiber.done && !waits) enter(fiber);
            done += fiber.done;
        }
        if (!block->moved && done < count) {
            std::fprintf(stderr, "some threads wait at a barrier that others do not reach\n");
            std::abort();
        }
    }
}

inline void run(unsigned blocks, unsigned threads, std::function<void()> kernel) {
    Block own;
    own.kernel = std::move(kernel);
    own.fibers.resize(threads);
    own.warps.assign(threads / LANES, Barrier{LANES});
    own.all.size = threads;
    for (std::vector<float>& slots : own.given) slots.resize(threads);
    for (std::vector<int>& votes : own.votes) votes.resize(threads);
    for (Fiber& fiber : own.fibers) fiber.stack.reset(new char[STACK_BYTES]);
    block = &own;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (Fiber& fiber : own.fibers) {
            fiber.done = false;
            begin(fiber.context, fiber.stack.get(), STACK_BYTES, body);
        }
        run_threads(blockIdx.x % 2 == 1);
    }
    block = nullptr;
}

// as ex2.approx.ftz
inline float power_of_two(float x) {
    const float power = exp2f(x);
    return power < 0x1p-126f ? 0.0f : power;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block->all); }
inline int __syncthreads_or(int value) {
    emulation::Block& block = *emulation::block;
    std::vector<int>& votes = block.votes[block.running->votes++ % 2];
    votes[threadIdx.x] = value;
    __syncthreads();
    for (int vote : votes)
        if (vote) return 1;
    return 0;
}
inline float __shfl_xor_sync(unsigned, float value, int away) {
    return emulation::exchange(value, threadIdx.x % emulation::LANES ^ away);
}
inline float __shfl_sync(unsigned, float value, int lane) {
    return emulation::exchange(value, lane);
}
inline int __all_sync(unsigned lanes, int value) {
    float all = value != 0;
    for (int away = emulation::LANES / 2; away; away /= 2)
        all *= __shfl_xor_sync(lanes, all, away);
    return all != 0.0f;
}
inline float __fdividef(float x, float y) { return x / y; }

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
template <class T>
void __stwb(T* to, T value) {
    *to = value;
}

// Both round to the nearest, ties to even.
struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value) {
        const uint32_t wide = emulation::bits_of(value);
        bits = isnan(value) ? 0x7fff
                            : static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    explicit operator float() const { return emulation::from_bits(uint32_t{bits} << 16); }
};

struct __half {
    uint16_t bits;

    __half() = default;
    explicit __half(float value) {
        const uint32_t sign = emulation::bits_of(value) >> 16 & 0x8000;
        const float size = fabsf(value);
        uint32_t half;
        if (isnan(value)) {
            half = 0x7fff;
        } else if (size >= 65520.0f) {
            half = 0x7c00;
        } else if (size < 0x1p-14f) {
            // below the normal numbers: steps of 2^-24
            half = static_cast<uint32_t>(nearbyintf(size * 0x1p24f));
        } else {
            const uint32_t wide = emulation::bits_of(size);
            half = (wide - (112u << 23) + 0xfff + (wide >> 13 & 1)) >> 13;
        }
        bits = static_cast<uint16_t>(sign | half);
    }
    explicit operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const float size = exponent == 0    ? ldexpf(static_cast<float>(fraction), -24)
                           : exponent == 31 ? (fraction ? NAN : INFINITY)
                                            : ldexpf(static_cast<float>(1024 + fraction),
                                                     exponent - 25);
        return bits & 0x8000 ? -size : size;
    }
};
