// How a product is shared out among threads.
#include "fastclip/product.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "bf16.h"
#include "pool.h"

namespace fastclip {

#ifdef FASTCLIP_BF16

namespace {

// Multiplications below which a further thread costs more than it saves.
constexpr int64_t LEAST_PART = 1 << 20;
// Parts begin at whole vectors.
constexpr int64_t STEP = 32;

const void* moved(const void* data, int64_t entries, int bytes) {
    return static_cast<const char*>(data) + entries * bytes;
}

}  // namespace

bool has_bf16_product() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

void bf16_product(Matrix a, bool wide, Matrix b, int64_t rows, int64_t inner, int64_t columns,
                  float* out, int64_t out_stride, bool add, int threads) {
    const bool by_rows = rows >= columns;
    const int64_t steps = (std::max(rows, columns) + STEP - 1) / STEP;
    const int64_t work = rows * inner * columns / LEAST_PART;
    const int parts = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>({threads, steps, work})));
    static thread_local std::vector<char> room;
    room.resize(std::max<size_t>(room.size(), parts * bf16_room()));
    char* const rooms = room.data();
    run(parts, [&](int part) {
        const int64_t most = std::max(rows, columns);
        const int64_t begin = std::min(most, steps * part / parts * STEP);
        const int64_t count = std::min(most, steps * (part + 1) / parts * STEP) - begin;
        char* const own = rooms + part * bf16_room();
        if (by_rows) {
            const Matrix some{moved(a.data, begin * a.row_stride, wide ? 4 : 2), a.row_stride,
                              a.column_stride};
            bf16_part(some, wide, b, count, inner, columns, out + begin * out_stride, out_stride,
                      add, own);
        } else {
            const Matrix some{moved(b.data, begin * b.column_stride, 2), b.row_stride,
                              b.column_stride};
            bf16_part(a, wide, some, rows, inner, count, out + begin, out_stride, add, own);
        }
    });
}

#else

bool has_bf16_product() { return false; }

void bf16_product(Matrix, bool, Matrix, int64_t, int64_t, int64_t, float*, int64_t, bool, int) {}

#endif

namespace {

// Sizes of 32 or of 64 bits: small ones in 64 are both, on machines whose lowest byte comes first.
using Size = const int64_t*;
using Sgemm = void (*)(const char*, const char*, Size, Size, Size, const float*, const float*, Size,
                       const float*, Size, const float*, float*, Size);
std::atomic<Sgemm> sgemm{nullptr};

}  // namespace

bool use_blas(void* found) {
    sgemm = reinterpret_cast<Sgemm>(found);
    if (!found) return false;
    const float a[] = {1, 2, 3, 4, 5, 6}, b[] = {1, 0, 2, 1, 1, 3};
    float out[4] = {};
    float_product({a, 3, false}, {b, 3, true}, 2, 3, 2, out);
    const float wanted[] = {7, 12, 16, 27};
    if (std::equal(out, out + 4, wanted)) return true;
    sgemm = nullptr;
    return false;
}

void float_product(Operand a, Operand b, int64_t rows, int64_t inner, int64_t columns, float* out) {
    const float one = 1, zero = 0;
    // its matrices stand column by column: all are transposed, so B comes first
    sgemm.load(std::memory_order_relaxed)(
        b.transposed ? "T" : "N", a.transposed ? "T" : "N", &columns, &rows, &inner, &one,
        static_cast<const float*>(b.data), &b.stride, static_cast<const float*>(a.data), &a.stride,
        &zero, out, &columns);
}

}  // namespace fastclip
