// Compiled with AVX512-BF16. Blocks of B are packed in panels of 32 columns, which twelve rows of A
// at a time sweep from first-level cache, their sums in registers. An instruction multiplies pairs
// of bf16 along the inner dimension, so that bf16 operands are held as pairs of 32 bits; a float32
// A meets B's entries widened.
#include "bf16.h"

#include <immintrin.h>

#include <cstring>

namespace fastclip {
namespace {

constexpr int64_t PANEL = 32;
constexpr int64_t DEPTH = 256;    // steps of a block: pairs or floats, so that a panel is 32 KiB
constexpr int64_t COLUMNS = 512;  // of a block of B: 512 KiB
constexpr int64_t ROWS = 192;      // of a block of A

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A's 32-bit entries: strides in bytes from row to row and from step to step.
struct Steps {
    const char* data;
    int64_t row, step;
};

inline __m512 accumulate(__m512 sum, __m512i a, __m512i b, bool wide) {
    return wide ? _mm512_fmadd_ps((__m512)a, (__m512)b, sum)
                : _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

template <bool WIDE, int R>
void panel(const Steps& a, const int32_t* b, int64_t steps, float* out, int64_t out_stride,
           __mmask16 left, __mmask16 right, bool add) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k) {
        const __m512i b0 = _mm512_loadu_si512(b + k * PANEL);
        const __m512i b1 = _mm512_loadu_si512(b + k * PANEL + 16);
        for (int r = 0; r < R; ++r) {
            int32_t entry;
            memcpy(&entry, a.data + r * a.row + k * a.step, 4);
            const __m512i ar = _mm512_set1_epi32(entry);
            sum[r][0] = accumulate(sum[r][0], ar, b0, WIDE);
            sum[r][1] = accumulate(sum[r][1], ar, b1, WIDE);
        }
    }
    for (int r = 0; r < R; ++r) {
        float* const to = out + r * out_stride;
        if (add) {
            sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_maskz_loadu_ps(left, to));
            sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_maskz_loadu_ps(right, to + 16));
        }
        _mm512_mask_storeu_ps(to, left, sum[r][0]);
        _mm512_mask_storeu_ps(to + 16, right, sum[r][1]);
    }
}

__mmask16 first(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

template <bool WIDE>
void block(const Steps& a, const int32_t* b, int64_t rows, int64_t steps, int64_t columns,
           float* out, int64_t out_stride, bool add) {
    for (int64_t j = 0; j < columns; j += PANEL, b += DEPTH * PANEL) {
        const __mmask16 left = first(columns - j), right = first(columns - j - 16);
        int64_t i = 0;
        const auto advance = [&](auto kernel, int64_t height) {
            for (; i + height <= rows; i += height) {
                const Steps from{a.data + i * a.row, a.row, a.step};
                kernel(from, b, steps, out + i * out_stride + j, out_stride, left, right, add);
            }
        };
        advance(panel<WIDE, 12>, 12);
        advance(panel<WIDE, 4>, 4);
        advance(panel<WIDE, 1>, 1);
    }
}

const uint16_t* bf16_at(const Matrix& m, int64_t row, int64_t column) {
    return static_cast<const uint16_t*>(m.data) + row * m.row_stride + column * m.column_stride;
}

inline int32_t pair_of(uint32_t low, uint32_t high) {
    return static_cast<int32_t>(low | high << 16);
}

void pack_pairs(const Matrix& b, int64_t inner, int64_t column, int64_t pairs, int64_t columns,
                int32_t* to) {
    for (int64_t j = 0; j < columns; j += PANEL, to += DEPTH * PANEL) {
        const int64_t count = least(PANEL, columns - j);
        memset(to, 0, sizeof(int32_t) * pairs * PANEL);
        if (b.row_stride == 1) {
            // pairs lie side by side already
            for (int64_t n = 0; n < count; ++n) {
                const uint16_t* const from = bf16_at(b, inner, column + j + n);
                for (int64_t p = 0; p < pairs; ++p) memcpy(to + p * PANEL + n, from + 2 * p, 4);
            }
            continue;
        }
        for (int64_t p = 0; p < pairs; ++p) {
            const uint16_t* const low = bf16_at(b, inner + 2 * p, column + j);
            const uint16_t* const high = low + b.row_stride;
            for (int64_t n = 0; n < count; ++n) to[p * PANEL + n] = pair_of(low[n], high[n]);
        }
    }
}

void pack_wide(const Matrix& b, int64_t inner, int64_t column, int64_t steps, int64_t columns,
               int32_t* to) {
    for (int64_t j = 0; j < columns; j += PANEL, to += DEPTH * PANEL) {
        const int64_t count = least(PANEL, columns - j);
        memset(to, 0, sizeof(int32_t) * steps * PANEL);
        for (int64_t k = 0; k < steps; ++k) {
            const uint16_t* const from = bf16_at(b, inner + k, column + j);
            for (int64_t n = 0; n < count; ++n) to[k * PANEL + n] = pair_of(0, from[n]);
        }
    }
}

// Float32 A whose columns are contiguous: (step, row), or each step would be on a page of its own.
void gather_rows(const float* from, int64_t stride, int64_t rows, int64_t steps, float* to) {
    for (int64_t k = 0; k < steps; ++k, from += stride, to += ROWS)
        memcpy(to, from, sizeof(float) * rows);
}

float widened(uint16_t bits) {
    const int32_t wide = pair_of(0, bits);
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// What an odd inner dimension leaves of pairs.
void add_last(const Matrix& a, const Matrix& b, int64_t rows, int64_t last, int64_t columns,
              float* out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; ++i) {
        const float left = widened(*bf16_at(a, i, last));
        for (int64_t j = 0; j < columns; ++j)
            out[i * out_stride + j] += left * widened(*bf16_at(b, last, j));
    }
}

// `inner` is not less than 1; a step takes `width` of it.
template <bool WIDE>
void multiply(const Matrix& a, const Matrix& b, int64_t rows, int64_t inner, int64_t columns,
              float* out, int64_t out_stride, bool add, int32_t* packed, float* gathered) {
    constexpr int64_t width = WIDE ? 1 : 2;
    const int64_t all = inner / width, entry = WIDE ? 4 : 2;
    const char* const data = static_cast<const char*>(a.data);
    for (int64_t k = 0; k == 0 || k < all; k += DEPTH) {
        const int64_t steps = least(DEPTH, all - k);
        for (int64_t n = 0; n < columns; n += COLUMNS) {
            const int64_t some = least(COLUMNS, columns - n);
            (WIDE ? pack_wide : pack_pairs)(b, k * width, n, steps, some, packed);
            for (int64_t m = 0; m < rows; m += ROWS) {
                const int64_t height = least(ROWS, rows - m);
                Steps from{data + (m * a.row_stride + k * width * a.column_stride) * entry,
                           a.row_stride * entry, 4};
                if (WIDE && a.column_stride != 1) {
                    gather_rows(reinterpret_cast<const float*>(from.data), a.column_stride, height,
                                steps, gathered);
                    from = {reinterpret_cast<const char*>(gathered), 4, 4 * ROWS};
                }
                block<WIDE>(from, packed, height, steps, some, out + m * out_stride + n,
                            out_stride, add || k > 0);
            }
        }
    }
}

}  // namespace

int64_t bf16_room() { return 4 * DEPTH * (COLUMNS + ROWS); }

void bf16_part(Matrix a, bool wide, Matrix b, int64_t rows, int64_t inner, int64_t columns,
               float* out, int64_t out_stride, bool add, char* room) {
    int32_t* const packed = reinterpret_cast<int32_t*>(room);
    float* const gathered = reinterpret_cast<float*>(room) + DEPTH * COLUMNS;
    (wide ? multiply<true> : multiply<false>)(a, b, rows, inner, columns, out, out_stride, add,
                                              packed, gathered);
    if (!wide && inner % 2)
        add_last(a, b, rows, inner - 1, columns, out, out_stride);
}

}  // namespace fastclip
