// What is compiled once for each instruction set: sweeps over some rows of a tile, serial.
#pragma once

#include "fastclip/epilogues.h"

namespace fastclip {

// Rows of a strip: one strip's maxima and exponentials are two sweeps, the second in cache.
constexpr int64_t STRIP = 32;

struct Kernels {
    const char* name;

    // Merge rows [begin, end) into `rows` and, unless null, all columns into `columns`.
    // `scratch`: 2 * columns floats. Biases, here and below, are null or as in epilogues.h.
    void (*statistics)(const Tile&, int64_t begin, int64_t end, Running rows,
                       const Running* columns, float* scratch, const Biases* biases);
    // running of n lines merged with (max, sum) of as many
    void (*merge)(int64_t n, Running running, Running other);
    // `scratch`: 2 * (columns + end - begin) floats, with biases 3 * columns + 2 * (end - begin)
    void (*gradient)(const Tile&, int64_t begin, int64_t end, Lines rows, const Lines* columns,
                     float* scratch, Sums* sums, const Biases* biases);
    // adds to `column_sum` unless that is null; `scratch`: columns floats
    void (*exponentials)(const Tile&, int64_t begin, int64_t end, float anchor, float* row_sum,
                         float* column_sum, float* scratch, const Biases* biases);
    // E, u, out and biases begin at the first of so many rows; `scratch`: columns floats with biases
    double (*weigh)(int64_t rows, int64_t columns, const float* E, int64_t E_stride, float scale,
                    const float* u, const float* v, float* out, int64_t out_stride,
                    float* scratch, const Biases* biases);
    void (*begin_rows)(const Tile&, int64_t begin, int64_t end, float* row_max, Running running,
                       float* dot);
    void (*end_rows)(const Tile&, int64_t begin, int64_t end, const float* row_max,
                     const float* running_max, const float* factor, float* out,
                     int64_t out_stride);
    // `signs`: null, or room for as many as there are columns; entries whose ids agree are positives
    void (*sigmoid)(const Tile&, int64_t begin, int64_t end, const float* weight, float* row_sum,
                    Sums* sums, float* signs);
};

const Kernels& kernels();

}  // namespace fastclip
