// The epilogues of `epilogues.h` on a GPU, and the last pass over gradients: what is done to a tile
// of float32 products after cuBLAS has made it. Meanings and rules are those of `epilogues.h`.
//
// All pointers are the device's, scale and offset included, so that no call waits for the GPU; the
// work is queued on `stream` (a cudaStream_t) and every call returns at once. A launch that fails
// throws std::runtime_error with the kernel's name and CUDA's own words.
//
// A tile is worked on in pieces of TILE_ROWS x TILE_COLUMNS, a thread block each. What a piece says
// of its lines goes into a workspace of the caller's, (pieces across, rows) for rows and (pieces
// down, columns) for columns, and is merged in order: no atomics, bitwise reproducible.
#pragma once

#include <cstdint>
#include <string>

#include "fastclip/epilogues.h"

namespace fastclip {
namespace cuda {

constexpr int TILE_ROWS = 64, TILE_COLUMNS = 128;
// each piece is shared by so many warps, which sum up by themselves
constexpr int WARPS = 8;

struct Tile {
    float* data;
    int64_t rows, columns, stride;
    const float* scale;
    const float* offset;  // or null
    // (i, i + diagonal) is left out; `columns` where there is none. And where ids agree.
    int64_t diagonal;
    const void* row_id = nullptr;
    const void* column_id = nullptr;
    int id_bytes = 0;  // 4 or 8

    int64_t pieces_down() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t pieces_across() const { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
};

enum class Type : int { F32, BF16, F16 };

// Rows are contiguous, `stride` entries apart.
struct Matrix {
    void* data;
    int64_t stride;
    Type type;
};

// Statistics of each piece's rows and, unless `columns.max` is null, columns, without the offset.
// Without `maxima` an anchor that serves may stand in a maximum's place. Biases are null or as in
// epilogues.h.
void statistics(const Tile& tile, Running rows, Running columns, bool maxima, const Biases* biases,
                void* stream);

// Statistics of each piece's rows by their maxima; exp(S - maximum of the piece's row) in place of
// the cosines, and the rows' sums of that times cos.
void begin_rows(const Tile& tile, Running rows, float* row_dot, void* stream);

// What so many pieces say of their lines, (pieces, lines), and what it is merged into.
struct Partials {
    int64_t pieces, lines;
    Running part, running;
};

// Merge statistics, maxima raised by the offset unless that is null, into running ones; `columns`
// may be none. With `part_dot`, the rows', sums relative to the new maximum go to `dot`.
void merge(Partials rows, Partials columns, const float* part_dot, const float* offset, float* dot,
           void* stream);

// out_i = factor_i exp(piece's row maximum - row_max_i) * (what `statistics` kept).
void end_rows(const Tile& tile, const float* part_max, const float* row_max, const float* factor,
              Matrix out, void* stream);

// G * scale into `out`, float32 (also in place) or bf16; `columns.lse` may be null. `sums`, unless
// null, takes each warp's sums of G * cos, and behind these its sums of G. What G has by biases goes
// to their `column_sum` and, where columns count, `row_sum`, of each piece as statistics do.
void gradient(const Tile& tile, Lines rows, Lines columns, Matrix out, float* sums,
              const Biases* biases, void* stream);

// Each piece's row sums of softplus(S); unless `out.data` is null G * scale and sums as above. With
// `positive_ids` entries whose ids agree have -S and -G.
void sigmoid(const Tile& tile, const float* weight, float* row_sum, Matrix out, float* sums,
             bool positive_ids, void* stream);

// out = total + coefficient_i * partner_i, rounded once; total is float32, out may be its memory.
void finish(int64_t rows, int64_t width, Matrix total, const float* coefficient, Matrix partner,
            Matrix out, void* stream);

// Row sums of a * b.
void row_dot(int64_t rows, int64_t width, Matrix a, Matrix b, float* out, void* stream);

// Why this machine's driver cannot run the library, or nothing. Makes no context.
std::string driver_unavailable_reason();

}  // namespace cuda
}  // namespace fastclip
