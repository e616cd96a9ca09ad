// Epilogues of the contrastive losses over tiles of S = scale * cos + offset: what is done to a
// tile of products while it is in cache. Raw pointers, sizes and strides; nothing of torch.
//
// A tile holds cosines (products of features) in float32, its rows `stride` entries apart. Entries
// that are left out, or whose logit is -inf, are no negatives: they count nowhere and their
// gradient is zero. -inf stands for the maximum and the log-sum-exp of a line without negatives. NaN stays NaN.
//
// The work is cut by sizes and the number of threads alone, and partial results are merged in one
// order: bitwise reproducible.
#pragma once

#include <cstdint>

namespace fastclip {

// Raised with every change of a signature or of a meaning in these headers: a library that was
// built before is then refused.
constexpr int ABI = 8;

constexpr int64_t NO_DIAGONAL = INT64_MIN;

struct Tile {
    float* data;
    int64_t rows, columns, stride;
    float scale, offset;
    // (i, i + diagonal) is left out, and where row_id[i] == column_id[j]
    int64_t diagonal = NO_DIAGONAL;
    const void* row_id = nullptr;
    const void* column_id = nullptr;
    int id_bytes = 0;  // 4 or 8
};

// Running maximum and sum of exp(logit - maximum) of some lines.
struct Running {
    float* max;
    float* sum;
};

// Log-sum-exps of some lines and their upstream gradients.
struct Lines {
    const float* lse;
    const float* weight;
};

// Sums of G * cos and of G; calls add to them.
struct Sums {
    double dot = 0, total = 0;
};

// Biases of a tile's rows and columns: a column's is added to S in the softmaxes of rows, a row's in
// those of columns, so that an entry has two logits. -inf leaves a line out of them. To `row_sum` and
// `column_sum` what G has by them is added: the columns' share of it over a row, the rows' over a
// column. Where exponentials are kept, `row` and `column` are the biases' exponentials.
struct Biases {
    const float *row, *column;
    float *row_sum, *column_sum;
};

// Merge a tile's rows into `rows`, and its columns into `columns` unless that is null.
void statistics(const Tile& tile, Running rows, const Running* columns, int threads,
                const Biases* biases = nullptr);

// G * scale in place of the cosines, G = a_i exp(S - lse_i) + b_j exp(S - lse_j).
void gradient(const Tile& tile, Lines rows, const Lines* columns, Sums* sums, int threads,
              const Biases* biases = nullptr);

// E = exp(S - anchor) in place of the cosines, 0 where left out; its sums are added to `row_sum` and,
// unless that is null, `column_sum`. E of logits far from the anchor is infinite or 0. Sums alone are
// weighed by biases.
void exponentials(const Tile& tile, float anchor, float* row_sum, float* column_sum, int threads,
                  const Biases* biases = nullptr);

// scale * E_ij * (u_i + v_j), v null for 0; matrices of so many rows and columns with their strides.
// With biases u_i is weighed by the column's, v_j by the row's. Returns the sum of G, the same
// without the scale.
double weigh(int64_t rows, int64_t columns, const float* E, int64_t E_stride, float scale,
             const float* u, const float* v, float* out, int64_t out_stride, int threads,
             const Biases* biases = nullptr);

// exp(S - row_max) in place of the cosines, with the maxima of this tile's rows; these rows are
// merged into `running`, and sums of exp(S - running maximum) * cos into `dot`. No offset.
void begin_rows(const Tile& tile, float* row_max, Running running, float* dot, int threads);

// out_i = factor_i exp(row_max_i - running_max_i) * (what begin_rows left); out may be the tile.
void end_rows(const Tile& tile, const float* row_max, const float* running_max,
              const float* factor, float* out, int64_t out_stride, int threads);

// Add softplus(S) to `row_sum`; with `sums`, G * scale in place of the cosines,
// G = weight_i sigmoid(S). With `positive_ids` entries whose ids agree are not left out: they have
// -S in place of S, and -G in place of G.
void sigmoid(const Tile& tile, const float* weight, float* row_sum, Sums* sums, int threads,
             bool positive_ids = false);

// The instruction set in use ("avx512", "avx2", "neon", "baseline"), and those that this machine
// can use, best first, null at the end.
const char* instructions();
const char* const* usable_instructions();
// For tests. False where the machine has not got it.
bool use_instructions(const char* name);

}  // namespace fastclip
