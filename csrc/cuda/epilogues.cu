// Sweeps over a tile of float32 products: every entry is read once and, where there is a gradient,
// written once. Memory's speed is the limit, so lanes hold their entries in registers and all else
// is made from these.
#include <type_traits>

#include "tile.cuh"

namespace fastclip {
namespace cuda {
namespace {

// Cosines lie in [-1, 1]: about |scale| less this much no exponential overflows, being e^69 = 2^99.5
// at the most. A sum in this range has lost nothing that counts to what is flushed below 2^-126.
constexpr float HEADROOM = 69.0f;
constexpr float LEAST_SUM = 0x1p-80f, LARGEST_SUM = 0x1p110f;
// the same of a log-sum-exp less the anchor, and of a line's factor
constexpr float LEAST_LOG = -55.0f, LARGEST_LOG = 76.0f;
constexpr float LEAST_FACTOR = 0x1p-110f, LARGEST_FACTOR = 0x1p110f;
// A logit whose gradient is zero, finite: sums of G * S meet it.
constexpr float LEFT_OUT = -1e30f;

// (max, sum of exp(logit - max), sum of that times cos) of one line; the anchor may stand for max.
struct Line {
    float max, sum, dot;

    __device__ void add(float other_max, float other_sum, float other_dot) {
        const float merged = fmaxf(max, other_max), about = finite(merged);
        // by its root twice: sums about an anchor are large enough to count where it is flushed
        const float before = exponential(0.5f * (max - about));
        const float now = exponential(0.5f * (other_max - about));
        sum = sum * before * before + other_sum * now * now;
        dot = dot * before * before + other_dot * now * now;
        max = merged;
    }
};

// What all lines' exponentials are about where it serves them, without the offset.
__device__ float shared_anchor(const Tile& tile) {
    return fmaxf(fabsf(*tile.scale) - HEADROOM, 0.0f);
}

// What a warp says of its lines: this lane's row, and its columns.
template <bool COLUMNS>
struct Sums {
    float row_max, row_sum, column_max[C], column_sum[C];

    // About one anchor; whether no line needs its own maximum.
    __device__ bool about(float anchor, const float (&v)[R][C], const Place& at) {
        float line[R];
        row_max = anchor;
        for (int c = 0; c < C; ++c) {
            // a sum of nothing is merged with others, about any number
            column_max[c] = at.rows ? anchor : -INFINITE;
            column_sum[c] = 0.0f;
        }
        for (int k = 0; k < R; ++k) {
            line[k] = 0.0f;
            for (int c = 0; c < C; ++c) {
                const float e = exponential(v[k][c], anchor);
                line[k] += e;
                if (COLUMNS) column_sum[c] += e;
            }
        }
        row_sum = lines_over_lanes(line, Plus{});
        bool served = own_line() >= at.rows || in_range(row_sum);
        if (COLUMNS)
            for (int c = 0; c < C; ++c)
                served &= c >= at.columns || at.rows == 0 || in_range(column_sum[c]);
        return __all_sync(ALL_LANES, served);
    }

    // About each line's own maximum; an entry's logits in its row's softmax and in its column's.
    template <class OfRow, class OfColumn>
    __device__ void about_maxima(OfRow&& of_row, OfColumn&& of_column) {
        float line[R];
        for (int k = 0; k < R; ++k)
            line[k] = fmaxf(fmaxf(of_row(k, 0), of_row(k, 1)), fmaxf(of_row(k, 2), of_row(k, 3)));
        row_max = lines_over_lanes(line, Larger{});
        if (COLUMNS) {
            for (int c = 0; c < C; ++c) {
                column_max[c] = of_column(0, c);
                for (int k = 1; k < R; ++k) column_max[c] = fmaxf(column_max[c], of_column(k, c));
                column_sum[c] = 0.0f;
                for (int k = 0; k < R; ++k)
                    column_sum[c] += exponential(of_column(k, c), finite(column_max[c]));
            }
        }
        for (int k = 0; k < R; ++k) {
            const float anchor = finite(of_line(row_max, k));
            line[k] = 0.0f;
            for (int c = 0; c < C; ++c) line[k] += exponential(of_row(k, c), anchor);
        }
        row_sum = lines_over_lanes(line, Plus{});
    }

    // NaN is not.
    static __device__ bool in_range(float sum) { return sum >= LEAST_SUM && sum < LARGEST_SUM; }
};

// The biases of a lane's rows and columns, 0 outside of the tile.
struct OwnBiases {
    float row[R], column[C];

    __device__ OwnBiases(const Biases& biases, const Place& at) {
        for (int k = 0; k < R; ++k) row[k] = k < at.rows ? biases.row[at.row + k] : 0.0f;
        for (int c = 0; c < C; ++c) column[c] = c < at.columns ? biases.column[at.column + c] : 0.0f;
    }
};

// Biased, an entry has two logits, and every line is about its own maximum.
template <bool COLUMNS, bool BIASED>
__global__ void __launch_bounds__(THREADS)
    statistics_kernel(Tile tile, Biases biases, Running rows, Running columns, bool maxima) {
    const Place at(tile);
    const float anchor = shared_anchor(tile);
    float v[R][C];
    Sums<COLUMNS> found;
    logits(tile, at, -INFINITE, v);
    // no memory is read again for it: a warp decides by itself
    const bool own = BIASED || maxima || !found.about(anchor, v, at);
    if constexpr (BIASED) {
        const OwnBiases bias(biases, at);
        found.about_maxima([&](int k, int c) { return v[k][c] + bias.column[c]; },
                           [&](int k, int c) { return v[k][c] + bias.row[k]; });
    } else if (own) {
        const auto logit = [&](int k, int c) { return v[k][c]; };
        found.about_maxima(logit, logit);
    }
    if constexpr (COLUMNS) {
        alignas(Vector<float>) __shared__ float shared_max[WARPS][TILE_COLUMNS];
        alignas(Vector<float>) __shared__ float shared_sum[WARPS][TILE_COLUMNS];
        const int first = lane_index() * C;
        for (int c = 0; c < C; ++c) {
            shared_max[warp_index()][first + c] = found.column_max[c];
            shared_sum[warp_index()][first + c] = found.column_sum[c];
        }
        const bool apart = __syncthreads_or(own);
        const int64_t j = at.across * TILE_COLUMNS + threadIdx.x;
        if (threadIdx.x < TILE_COLUMNS && j < tile.columns) {
            Line column{apart ? -INFINITE : anchor, 0.0f, 0.0f};
            for (int w = 0; w < WARPS; ++w) {
                const float sum = shared_sum[w][threadIdx.x];
                if (apart) column.add(shared_max[w][threadIdx.x], sum, 0.0f);
                else column.sum += sum;
            }
            columns.max[at.down * tile.columns + j] = column.max;
            columns.sum[at.down * tile.columns + j] = column.sum;
        }
    }
    if (at.stores_line()) {
        rows.max[at.line(tile)] = found.row_max;
        rows.sum[at.line(tile)] = found.row_sum;
    }
}

__global__ void __launch_bounds__(THREADS)
    begin_rows_kernel(Tile tile, Running rows, float* row_dot) {
    const Place at(tile);
    float v[R][C], line[R], dot[R];
    logits(tile, at, -INFINITE, v);
    const Entries<float> kept(tile.data, tile.stride, at);
    for (int k = 0; k < R; ++k)
        line[k] = fmaxf(fmaxf(v[k][0], v[k][1]), fmaxf(v[k][2], v[k][3]));
    const float max = lines_over_lanes(line, Larger{});
    for (int k = 0; k < R; ++k) {
        const float anchor = finite(of_line(max, k));
        line[k] = dot[k] = 0.0f;
        for (int c = 0; c < C; ++c) {
            const float logit = v[k][c];
            v[k][c] = exponential(logit, anchor);
            line[k] += v[k][c];
            dot[k] += logit == -INFINITE ? 0.0f : v[k][c] * logit;
        }
        kept.put(k, v[k]);
    }
    const float sum = lines_over_lanes(line, Plus{}), row = lines_over_lanes(dot, Plus{});
    if (at.stores_line()) {
        rows.max[at.line(tile)] = max;
        rows.sum[at.line(tile)] = sum;
        row_dot[at.line(tile)] = row / *tile.scale;
    }
}

__host__ __device__ int64_t blocks_of(int64_t lines) { return (lines + LANES - 1) / LANES; }

// A lane a line; the warps share its pieces, and the first merges what they found.
__global__ void __launch_bounds__(THREADS)
    merge_kernel(Partials rows, Partials columns, const float* part_dot, const float* offset,
                 float* dot) {
    __shared__ Line found[WARPS][LANES];
    const int64_t of_rows = blocks_of(rows.lines);
    const bool is_row = blockIdx.x < of_rows;
    // by members: a reference would put both into local memory
    const Partials of{
        is_row ? rows.pieces : columns.pieces, is_row ? rows.lines : columns.lines,
        {is_row ? rows.part.max : columns.part.max, is_row ? rows.part.sum : columns.part.sum},
        {is_row ? rows.running.max : columns.running.max,
         is_row ? rows.running.sum : columns.running.sum}};
    const int lane = lane_index();
    const int64_t i = (blockIdx.x - (is_row ? 0 : of_rows)) * LANES + lane;
    Line own{-INFINITE, 0.0f, 0.0f};
    if (i < of.lines) {
#pragma unroll 4
        for (int64_t at = warp_index() * of.lines + i; at < of.pieces * of.lines;
             at += WARPS * of.lines)
            own.add(of.part.max[at], of.part.sum[at], part_dot ? part_dot[at] : 0.0f);
    }
    found[warp_index()][lane] = own;
    __syncthreads();
    if (warp_index() > 0 || i >= of.lines) return;
    const float raised = offset ? *offset : 0.0f;
    Line total{of.running.max[i], of.running.sum[i], 0.0f};
    for (int w = 0; w < WARPS; ++w)
        total.add(found[w][lane].max + raised, found[w][lane].sum, found[w][lane].dot);
    // a maximum passes over NaN, a sum does not
    of.running.max[i] = total.sum == total.sum ? total.max : total.sum;
    of.running.sum[i] = total.sum;
    if (part_dot) dot[i] = total.dot;
}

template <class Out>
__global__ void __launch_bounds__(THREADS)
    end_rows_kernel(Tile tile, const float* part_max, const float* row_max, const float* factor,
                    Out* out, int64_t out_stride) {
    const Place at(tile);
    const Entries<float> kept(tile.data, tile.stride, at);
    const Entries<Out> to(out, out_stride, at);
    float e[R][C];
    for (int k = 0; k < R; ++k) kept.get(k, e[k]);
    for (int k = 0; k < R; ++k) {
        if (k >= at.rows) break;
        const int64_t i = at.row + k;
        const float share = exponential(part_max[at.across * tile.rows + i] - finite(row_max[i]));
        for (int c = 0; c < C; ++c) e[k][c] *= factor[i] * share;
        to.put(k, e[k]);
    }
}

// The log-sum-exp of a line less the offset, and its weight.
struct Weighted {
    float anchor, weight;

    __device__ float of(float logit) const { return exponential(logit, finite(anchor)) * weight; }
    // The weight of exp(S - shared anchor); `served` falls where that would have lost digits.
    __device__ float factor(float shared, bool& served) const {
        const float above = anchor - shared, u = weight * exponential(-above), size = fabsf(u);
        if (anchor == -INFINITE) {
            served &= weight == weight;
            return 0.0f;
        }
        served &= above >= LEAST_LOG && above < LARGEST_LOG &&
                  (weight == 0.0f || (size >= LEAST_FACTOR && size <= LARGEST_FACTOR));
        return u;
    }
};

// A line outside of the tile is without entries.
__device__ Weighted weighted(Lines lines, int64_t first, int n, int inside, float offset) {
    if (n >= inside) return {-INFINITE, 0.0f};
    return {lines.lse[first + n] - offset, lines.weight[first + n]};
}

// G, an entry at a time, into its matrix, times the scale, and into the sums of this lane.
template <class Out, class Entry>
__device__ void emit(const Entries<Out>& to, const float (&v)[R][C], float scale, float& dot,
                     float& total, Entry&& entry) {
    // asked for, as an entry of the sigmoid's is long; short loops are unrolled by themselves
#pragma unroll
    for (int k = 0; k < R; ++k) {
        float g[C];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            g[c] = entry(k, c);
            dot += g[c] * v[k][c];
            total += g[c];
            g[c] *= scale;
        }
        to.put(k, g);
    }
}

__device__ void store_sums(float* sums, const Place& at, float dot, float total, float scale) {
    if (!sums) return;
    dot = over_lanes(dot, Plus{});
    total = over_lanes(total, Plus{});
    if (lane_index() > 0) return;
    sums[at.warp()] = dot / scale;
    sums[int64_t{gridDim.x} * WARPS + at.warp()] = total;
}

// A column's sum over the warps, each of which has that of its rows, to the piece's workspace.
__device__ void store_columns(const float (&sum)[C], const Tile& tile, const Place& at,
                              float* to) {
    __shared__ float of_warp[WARPS][TILE_COLUMNS];
    for (int c = 0; c < C; ++c) of_warp[warp_index()][lane_index() * C + c] = sum[c];
    __syncthreads();
    const int64_t j = at.across * TILE_COLUMNS + threadIdx.x;
    if (threadIdx.x >= TILE_COLUMNS || j >= tile.columns) return;
    float total = 0.0f;
    for (int w = 0; w < WARPS; ++w) total += of_warp[w][threadIdx.x];
    to[at.down * tile.columns + j] = total;
}

template <bool COLUMNS, bool BIASED, class Out>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(Tile tile, Lines rows, Lines columns, Out* out, int64_t out_stride,
                    float* sums, Biases biases) {
    const Place at(tile);
    float v[R][C], dot = 0.0f, total = 0.0f;
    logits(tile, at, LEFT_OUT, v);
    const Entries<Out> to(out, out_stride, at);
    const float scale = *tile.scale, offset = tile.offset ? *tile.offset : 0.0f;
    // a lane has one row's, and gives it to the others
    const Weighted own = weighted(rows, at.row, own_line(), at.rows, offset);
    Weighted of_column[C];
    if constexpr (COLUMNS)
        for (int c = 0; c < C; ++c)
            of_column[c] = weighted(columns, at.column, c, at.columns, offset);
    if constexpr (COLUMNS && !BIASED) {
        const float anchor = shared_anchor(tile);
        bool served = true;
        const float own_factor = own.factor(anchor, served);
        float u[R], w[C];
        for (int c = 0; c < C; ++c) w[c] = of_column[c].factor(anchor, served);
        if (__all_sync(ALL_LANES, served)) {
            for (int k = 0; k < R; ++k) u[k] = of_line(own_factor, k);
            emit(to, v, scale, dot, total,
                 [&](int k, int c) { return exponential(v[k][c], anchor) * (u[k] + w[c]); });
            store_sums(sums, at, dot, total, scale);
            return;
        }
    }
    Weighted of_row[R];
    for (int k = 0; k < R; ++k)
        of_row[k] = {finite(of_line(own.anchor, k)), of_line(own.weight, k)};
    if constexpr (BIASED) {
        const OwnBiases bias(biases, at);
        float by_row[R] = {}, by_column[C] = {};
        emit(to, v, scale, dot, total, [&](int k, int c) {
            const float of_rows = of_row[k].of(v[k][c] + bias.column[c]);
            const float of_columns = COLUMNS ? of_column[c].of(v[k][c] + bias.row[k]) : 0.0f;
            by_column[c] += of_rows;
            by_row[k] += of_columns;
            return of_rows + of_columns;
        });
        store_columns(by_column, tile, at, biases.column_sum);
        if constexpr (COLUMNS) {
            const float of_line = lines_over_lanes(by_row, Plus{});
            if (at.stores_line()) biases.row_sum[at.line(tile)] = of_line;
        }
    } else {
        emit(to, v, scale, dot, total, [&](int k, int c) {
            return of_row[k].of(v[k][c]) + (COLUMNS ? of_column[c].of(v[k][c]) : 0.0f);
        });
    }
    store_sums(sums, at, dot, total, scale);
}

// With SIGNED entries whose ids agree are positives.
template <bool GRADIENT, bool SIGNED, class Out>
__global__ void __launch_bounds__(THREADS)
    sigmoid_kernel(Tile tile, const float* weight, float* row_sum, Out* out, int64_t out_stride,
                   float* sums) {
    const Place at(tile);
    float v[R][C], line[R], w[R], dot = 0.0f, total = 0.0f;
    logits<!SIGNED>(tile, at, LEFT_OUT, v);
    static_assert(R * C <= 32, "a bit for each entry of a lane");
    uint32_t positive = 0;
    if constexpr (SIGNED)
        where_ids_agree(tile, at, [&](int k, int c) {
            if (v[k][c] != LEFT_OUT) positive |= 1u << (k * C + c);
        });
    const Entries<Out> to(out, out_stride, at);
    const float scale = *tile.scale, offset = tile.offset ? *tile.offset : 0.0f;
    for (int k = 0; k < R; ++k) {
        line[k] = 0.0f;
        w[k] = GRADIENT && k < at.rows ? weight[at.row + k] : 0.0f;
    }
    // one exponential gives softplus and sigmoid
    const auto entry = [&](int k, int c) {
        const float sign = positive >> (k * C + c) & 1u ? -1.0f : 1.0f;
        const float z = sign * (v[k][c] + offset), e = exponential(-fabsf(z));
        line[k] += fmaxf(z, 0.0f) + log1pf(e);
        return sign * w[k] * __fdividef(z < 0.0f ? e : 1.0f, 1.0f + e);
    };
    if constexpr (GRADIENT) {
        emit(to, v, scale, dot, total, entry);
    } else {
#pragma unroll
        for (int k = 0; k < R; ++k)
#pragma unroll
            for (int c = 0; c < C; ++c) entry(k, c);
    }
    const float sum = lines_over_lanes(line, Plus{});
    if (at.stores_line()) row_sum[at.line(tile)] = sum;
    if (GRADIENT) store_sums(sums, at, dot, total, scale);
}

int64_t pieces(const Tile& tile) { return tile.pieces_down() * tile.pieces_across(); }

// Call `work` with G's memory as what it is.
template <class Work>
void with_gradient(Matrix out, Work&& work) {
    if (out.type == Type::F16) throw std::runtime_error("a gradient in float16 would be flushed");
    if (out.type == Type::BF16) work(static_cast<__nv_bfloat16*>(out.data));
    if (out.type == Type::F32) work(static_cast<float*>(out.data));
}

}  // namespace

void statistics(const Tile& tile, Running rows, Running columns, bool maxima, const Biases* biases,
                void* stream) {
    auto kernel = columns.max ? statistics_kernel<true, false> : statistics_kernel<false, false>;
    if (biases) kernel = columns.max ? statistics_kernel<true, true> : statistics_kernel<false, true>;
    launch("statistics", kernel, pieces(tile), stream, tile, biases ? *biases : Biases{}, rows,
           columns, maxima);
}

void begin_rows(const Tile& tile, Running rows, float* row_dot, void* stream) {
    launch("begin_rows", begin_rows_kernel, pieces(tile), stream, tile, rows, row_dot);
}

void merge(Partials rows, Partials columns, const float* part_dot, const float* offset, float* dot,
           void* stream) {
    launch("merge", merge_kernel, blocks_of(rows.lines) + blocks_of(columns.lines), stream, rows,
           columns, part_dot, offset, dot);
}

void end_rows(const Tile& tile, const float* part_max, const float* row_max, const float* factor,
              Matrix out, void* stream) {
    with_gradient(out, [&](auto* data) {
        launch("end_rows", end_rows_kernel<std::remove_pointer_t<decltype(data)>>, pieces(tile),
               stream, tile, part_max, row_max, factor, data, out.stride);
    });
}

void gradient(const Tile& tile, Lines rows, Lines columns, Matrix out, float* sums,
              const Biases* biases, void* stream) {
    with_gradient(out, [&](auto* data) {
        using Out = std::remove_pointer_t<decltype(data)>;
        auto kernel = columns.lse ? gradient_kernel<true, false, Out>
                                  : gradient_kernel<false, false, Out>;
        if (biases)
            kernel = columns.lse ? gradient_kernel<true, true, Out>
                                 : gradient_kernel<false, true, Out>;
        launch("gradient", kernel, pieces(tile), stream, tile, rows, columns, data, out.stride,
               sums, biases ? *biases : Biases{});
    });
}

void sigmoid(const Tile& tile, const float* weight, float* row_sum, Matrix out, float* sums,
             bool positive_ids, void* stream) {
    const bool is_signed = positive_ids && tile.row_id;
    const auto queue = [&](auto kernel, auto* data, int64_t stride) {
        launch("sigmoid", kernel, pieces(tile), stream, tile, weight, row_sum, data, stride, sums);
    };
    if (!out.data) {
        queue(is_signed ? sigmoid_kernel<false, true, float> : sigmoid_kernel<false, false, float>,
              tile.data, tile.stride);
        return;
    }
    with_gradient(out, [&](auto* data) {
        using Out = std::remove_pointer_t<decltype(data)>;
        queue(is_signed ? sigmoid_kernel<true, true, Out> : sigmoid_kernel<true, false, Out>, data,
              out.stride);
    });
}

std::string driver_unavailable_reason() {
#ifdef FASTCLIP_EMULATED
    return "";
#else
    int driver = 0, runtime = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (driver == 0) return "this machine has no NVIDIA driver";
    cudaRuntimeGetVersion(&runtime);
    // one version's binaries run with any driver of its own or a later generation
    if (driver / 1000 >= runtime / 1000) return "";
    const auto named = [](int version) {
        return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    };
    return "this machine's driver is for CUDA " + named(driver) + ", the library was built with " +
           named(runtime) + ": update the driver, or build it with an older nvcc";
#endif
}

}  // namespace cuda
}  // namespace fastclip
