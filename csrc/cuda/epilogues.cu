// Sweeps over a tile of float32 products: every entry is read once and, where there is a gradient,
// written once. Memory's speed is the limit, so lanes hold their entries in registers and all else
// is made from these.
#include <type_traits>

#include "tile.cuh"

namespace fastclip {
namespace cuda {
namespace {

// exp spans e^87 in float32, and e^17 of them hold the terms that still count: where a warp's
// lines lie closer together, one exponential about a common anchor serves rows and columns.
constexpr float SPAN = 66.0f;
// A logit whose gradient is zero, finite: sums of G * S meet it.
constexpr float LEFT_OUT = -1e30f;

// (max, sum of exp(logit - max), sum of that times cos) of one line.
struct Line {
    float max, sum, dot;

    __device__ void add(float other_max, float other_sum, float other_dot) {
        const float merged = fmaxf(max, other_max), about = finite(merged);
        const float before = __expf(max - about), now = __expf(other_max - about);
        sum = sum * before + other_sum * now;
        dot = dot * before + other_dot * now;
        max = merged;
    }
};

// The greatest value of each column, over the warp's rows.
__device__ void maxima_of_columns(const float (&v)[R][C], float (&max)[C]) {
    for (int c = 0; c < C; ++c) {
        max[c] = v[0][c];
        for (int k = 1; k < R; ++k) max[c] = fmaxf(max[c], v[k][c]);
    }
}

// Sums of exponentials about the lines' own maxima; of this lane's row, and of its columns.
__device__ float sums_of_both(const float (&v)[R][C], float row_max, const float (&column_max)[C],
                              float (&column_sum)[C]) {
    float top = row_max, low = row_max == -INFINITE ? INFINITE : row_max, line[R];
    for (int c = 0; c < C; ++c) {
        top = fmaxf(top, column_max[c]);
        low = fminf(low, column_max[c] == -INFINITE ? INFINITE : column_max[c]);
        column_sum[c] = 0.0f;
    }
    top = over_lanes(top, Larger{});
    low = over_lanes(low, Smaller{});
    if (low <= top && top - low < SPAN) {
        for (int k = 0; k < R; ++k) {
            line[k] = 0.0f;
            for (int c = 0; c < C; ++c) {
                const float e = __expf(v[k][c] - top);
                line[k] += e;
                column_sum[c] += e;
            }
        }
        for (int c = 0; c < C; ++c) column_sum[c] *= __expf(fminf(top - column_max[c], SPAN));
        return lines_over_lanes(line, Plus{}) * __expf(fminf(top - row_max, SPAN));
    }
    for (int k = 0; k < R; ++k) {
        const float anchor = finite(of_line(row_max, k));
        line[k] = 0.0f;
        for (int c = 0; c < C; ++c) {
            line[k] += __expf(v[k][c] - anchor);
            column_sum[c] += __expf(v[k][c] - finite(column_max[c]));
        }
    }
    return lines_over_lanes(line, Plus{});
}

template <bool COLUMNS, bool KEEP>
__global__ void __launch_bounds__(THREADS)
    statistics_kernel(Tile tile, Running rows, Running columns, float* row_dot) {
    const Place at(tile);
    float v[R][C], line[R], row_sum;
    logits(tile, at, -INFINITE, v);
    for (int k = 0; k < R; ++k)
        line[k] = fmaxf(fmaxf(v[k][0], v[k][1]), fmaxf(v[k][2], v[k][3]));
    const float row_max = lines_over_lanes(line, Larger{});
    if constexpr (COLUMNS) {
        alignas(Vector<float>) __shared__ float maxima[WARPS][TILE_COLUMNS];
        alignas(Vector<float>) __shared__ float sums[WARPS][TILE_COLUMNS];
        float column_max[C], column_sum[C];
        maxima_of_columns(v, column_max);
        row_sum = sums_of_both(v, row_max, column_max, column_sum);
        const int first = lane_index() * C;
        for (int c = 0; c < C; ++c) {
            maxima[warp_index()][first + c] = column_max[c];
            sums[warp_index()][first + c] = column_sum[c];
        }
        __syncthreads();
        const int64_t j = at.across * TILE_COLUMNS + threadIdx.x;
        if (threadIdx.x < TILE_COLUMNS && j < tile.columns) {
            Line column{-INFINITE, 0.0f, 0.0f};
            for (int w = 0; w < WARPS; ++w)
                column.add(maxima[w][threadIdx.x], sums[w][threadIdx.x], 0.0f);
            columns.max[at.down * tile.columns + j] = column.max;
            columns.sum[at.down * tile.columns + j] = column.sum;
        }
    } else {
        float dot[R];
        const Entries<float> kept(tile.data, tile.stride, at);
        for (int k = 0; k < R; ++k) {
            const float anchor = finite(of_line(row_max, k));
            line[k] = dot[k] = 0.0f;
            for (int c = 0; c < C; ++c) {
                const float logit = v[k][c];
                v[k][c] = __expf(logit - anchor);
                line[k] += v[k][c];
                dot[k] += logit == -INFINITE ? 0.0f : v[k][c] * logit;
            }
            if (KEEP) kept.put(k, v[k]);
        }
        row_sum = lines_over_lanes(line, Plus{});
        if (KEEP) {
            const float sum = lines_over_lanes(dot, Plus{});
            if (at.stores_line()) row_dot[at.line(tile)] = sum / *tile.scale;
        }
    }
    if (at.stores_line()) {
        rows.max[at.line(tile)] = row_max;
        rows.sum[at.line(tile)] = row_sum;
    }
}

// A lane a line; the warps share its pieces, and the first merges what they found.
__global__ void __launch_bounds__(THREADS)
    merge_kernel(int64_t pieces, int64_t lines, Running part, const float* part_dot,
                 const float* offset, Running running, float* dot) {
    __shared__ Line found[WARPS][LANES];
    const int lane = lane_index();
    const int64_t i = int64_t{blockIdx.x} * LANES + lane;
    Line own{-INFINITE, 0.0f, 0.0f};
    if (i < lines) {
#pragma unroll 4
        for (int64_t at = warp_index() * lines + i; at < pieces * lines; at += WARPS * lines)
            own.add(part.max[at], part.sum[at], part_dot ? part_dot[at] : 0.0f);
    }
    found[warp_index()][lane] = own;
    __syncthreads();
    if (warp_index() > 0 || i >= lines) return;
    const float raised = offset ? *offset : 0.0f;
    Line total{running.max[i], running.sum[i], 0.0f};
    for (int w = 0; w < WARPS; ++w)
        total.add(found[w][lane].max + raised, found[w][lane].sum, found[w][lane].dot);
    // a maximum passes over NaN, a sum does not
    running.max[i] = total.sum == total.sum ? total.max : total.sum;
    running.sum[i] = total.sum;
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
        const float share = __expf(part_max[at.across * tile.rows + i] - finite(row_max[i]));
        for (int c = 0; c < C; ++c) e[k][c] *= factor[i] * share;
        to.put(k, e[k]);
    }
}

// Some lines' log-sum-exps less the offset, and weights. Lines outside of the tile are without
// entries.
template <int N>
struct Anchors {
    float anchor[N], weight[N];

    __device__ Anchors(Lines lines, int64_t first, int inside, float offset) {
        for (int n = 0; n < N; ++n) {
            anchor[n] = n < inside ? lines.lse[first + n] - offset : -INFINITE;
            weight[n] = n < inside ? lines.weight[first + n] : 0.0f;
        }
    }
    // the lowest and the highest that have entries
    __device__ void span(float& low, float& high) const {
        for (int n = 0; n < N; ++n) {
            low = fminf(low, anchor[n] == -INFINITE ? INFINITE : anchor[n]);
            high = fmaxf(high, anchor[n]);
        }
    }
    // weights become those of exp(S - low); NaN stays
    __device__ void move_to(float low) {
        for (int n = 0; n < N; ++n) {
            const float away = low - anchor[n];
            weight[n] *= __expf(away > 0.0f ? 0.0f : away);
        }
    }
    __device__ float of(int n, float logit) const {
        return __expf(logit - finite(anchor[n])) * weight[n];
    }
};

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

template <bool COLUMNS, class Out>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(Tile tile, Lines rows, Lines columns, Out* out, int64_t out_stride,
                    float* sums) {
    const Place at(tile);
    float v[R][C], dot = 0.0f, total = 0.0f;
    logits(tile, at, LEFT_OUT, v);
    const Entries<Out> to(out, out_stride, at);
    const float scale = *tile.scale, offset = tile.offset ? *tile.offset : 0.0f;
    Anchors<R> of_rows(rows, at.row, at.rows, offset);
    if constexpr (COLUMNS) {
        Anchors<C> of_columns(columns, at.column, at.columns, offset);
        float low = INFINITE, high = -INFINITE;
        of_rows.span(low, high);
        of_columns.span(low, high);
        low = over_lanes(low, Smaller{});
        high = over_lanes(high, Larger{});
        // no logit lies above its lines' log-sum-exps, so none is far above the lowest
        if (low <= high && high - low < SPAN) {
            of_rows.move_to(low);
            of_columns.move_to(low);
            emit(to, v, scale, dot, total, [&](int k, int c) {
                return __expf(v[k][c] - low) * (of_rows.weight[k] + of_columns.weight[c]);
            });
        } else {
            emit(to, v, scale, dot, total, [&](int k, int c) {
                return of_rows.of(k, v[k][c]) + of_columns.of(c, v[k][c]);
            });
        }
    } else {
        emit(to, v, scale, dot, total, [&](int k, int c) { return of_rows.of(k, v[k][c]); });
    }
    store_sums(sums, at, dot, total, scale);
}

template <bool GRADIENT, class Out>
__global__ void __launch_bounds__(THREADS)
    sigmoid_kernel(Tile tile, const float* weight, float* row_sum, Out* out, int64_t out_stride,
                   float* sums) {
    const Place at(tile);
    float v[R][C], line[R], w[R], dot = 0.0f, total = 0.0f;
    logits(tile, at, LEFT_OUT, v);
    const Entries<Out> to(out, out_stride, at);
    const float scale = *tile.scale, offset = tile.offset ? *tile.offset : 0.0f;
    for (int k = 0; k < R; ++k) {
        line[k] = 0.0f;
        w[k] = GRADIENT && k < at.rows ? weight[at.row + k] : 0.0f;
    }
    // one exponential gives softplus and sigmoid
    const auto entry = [&](int k, int c) {
        const float z = v[k][c] + offset, e = __expf(-fabsf(z));
        line[k] += fmaxf(z, 0.0f) + log1pf(e);
        return w[k] * __fdividef(z < 0.0f ? e : 1.0f, 1.0f + e);
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

void statistics(const Tile& tile, Running rows, Running columns, float* row_dot, void* stream) {
    auto kernel = statistics_kernel<false, false>;
    if (columns.max) kernel = statistics_kernel<true, false>;
    if (row_dot) kernel = statistics_kernel<false, true>;
    launch("statistics", kernel, pieces(tile), stream, tile, rows, columns, row_dot);
}

void merge(int64_t pieces, int64_t lines, Running part, const float* part_dot, const float* offset,
           Running running, float* dot, void* stream) {
    launch("merge", merge_kernel, (lines + LANES - 1) / LANES, stream, pieces, lines, part,
           part_dot, offset, running, dot);
}

void end_rows(const Tile& tile, const float* part_max, const float* row_max, const float* factor,
              Matrix out, void* stream) {
    with_gradient(out, [&](auto* data) {
        launch("end_rows", end_rows_kernel<std::remove_pointer_t<decltype(data)>>, pieces(tile),
               stream, tile, part_max, row_max, factor, data, out.stride);
    });
}

void gradient(const Tile& tile, Lines rows, Lines columns, Matrix out, float* sums, void* stream) {
    with_gradient(out, [&](auto* data) {
        using Out = std::remove_pointer_t<decltype(data)>;
        auto kernel = columns.lse ? gradient_kernel<true, Out> : gradient_kernel<false, Out>;
        launch("gradient", kernel, pieces(tile), stream, tile, rows, columns, data, out.stride,
               sums);
    });
}

void sigmoid(const Tile& tile, const float* weight, float* row_sum, Matrix out, float* sums,
             void* stream) {
    if (!out.data) {
        launch("sigmoid", sigmoid_kernel<false, float>, pieces(tile), stream, tile, weight,
               row_sum, tile.data, tile.stride, sums);
        return;
    }
    with_gradient(out, [&](auto* data) {
        launch("sigmoid", sigmoid_kernel<true, std::remove_pointer_t<decltype(data)>>,
               pieces(tile), stream, tile, weight, row_sum, data, out.stride, sums);
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
