// How a tile is cut for the threads, and the order in which their results are merged.
#include "fastclip/epilogues.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parts.h"
#include "pool.h"

namespace fastclip {
namespace {

// Room of this thread's own for calls that need some; it only grows.
float* scratch(size_t count) {
    static thread_local std::vector<float> room;
    if (room.size() < count) room.resize(count);
    return room.data();
}

Sums* own(std::vector<Sums>& of_parts, int part, bool wanted) {
    return wanted ? &of_parts[part] : nullptr;
}

// Those of rows from `first` on, with sums of columns of their own.
Biases biases_from(const Biases* all, int64_t first, float* column_sum) {
    if (!all) return {};
    return {all->row + first, all->column, all->row_sum + first, column_sum};
}

void add(const std::vector<Sums>& of_parts, Sums* sums) {
    for (const Sums& part : of_parts) {
        if (!sums) return;
        sums->dot += part.dot;
        sums->total += part.total;
    }
}

// Sums of columns, each part's `size` floats behind the last one's.
void add_columns(const Parts& parts, const float* room, size_t size, size_t m, float* total) {
    for (int part = 0; part < parts.count; ++part)
        for (size_t j = 0; j < m; ++j) total[j] += room[part * size + j];
}

}  // namespace

void statistics(const Tile& tile, Running rows, const Running* columns, int threads,
                const Biases* biases) {
    const Parts parts(tile.rows, tile.columns, threads);
    const Kernels& k = kernels();
    const size_t m = static_cast<size_t>(tile.columns);
    // the columns of each part, and its scratch
    float* const room = scratch(columns ? parts.count * 4 * m : 0);
    run(parts.count, [&](int part) {
        float* const of_part = room + part * 4 * m;
        const Running merged{of_part, of_part + m};
        if (columns && parts.count > 1) {
            std::fill_n(merged.max, m, -std::numeric_limits<float>::infinity());
            std::fill_n(merged.sum, m, 0.0f);
        }
        const Running* const target = columns && parts.count > 1 ? &merged : columns;
        k.statistics(tile, parts.begin(part), parts.end(part), rows, target, of_part + 2 * m,
                     biases);
    });
    if (!columns || parts.count == 1) return;
    // each thread merges a range of columns, and for each column the parts in their order
    const Parts ranges(tile.columns, 4 * parts.count, threads);
    run(ranges.count, [&](int range) {
        const int64_t first = ranges.begin(range), n = ranges.end(range) - first;
        for (int part = 0; part < parts.count; ++part) {
            float* const of_part = room + part * 4 * m + first;
            k.merge(n, {columns->max + first, columns->sum + first}, {of_part, of_part + m});
        }
    });
}

void gradient(const Tile& tile, Lines rows, const Lines* columns, Sums* sums, int threads,
              const Biases* biases) {
    const Parts parts(tile.rows, tile.columns, threads);
    const Kernels& k = kernels();
    const size_t m = static_cast<size_t>(tile.columns);
    // with biases the sums of the part's columns, and their scratch, before the rest
    const size_t of_biases = biases ? m : 0;
    const size_t size = 2 * of_biases + 2 * (m + parts.largest());
    float* const room = scratch(parts.count * size);
    std::vector<Sums> of_parts(parts.count);
    run(parts.count, [&](int part) {
        float* const of_part = room + part * size;
        std::fill_n(of_part, of_biases, 0.0f);
        const Biases of_rows = biases_from(biases, 0, of_part);
        k.gradient(tile, parts.begin(part), parts.end(part), rows, columns, of_part + of_biases,
                   own(of_parts, part, sums), biases ? &of_rows : nullptr);
    });
    add(of_parts, sums);
    if (biases) add_columns(parts, room, size, m, biases->column_sum);
}

void exponentials(const Tile& tile, float anchor, float* row_sum, float* column_sum,
                  int threads, const Biases* biases) {
    const Parts parts(tile.rows, tile.columns, threads);
    const size_t m = static_cast<size_t>(tile.columns);
    // the columns of each part, and its scratch
    float* const room = scratch(column_sum ? parts.count * 2 * m : 0);
    std::fill_n(room, column_sum ? parts.count * 2 * m : 0, 0.0f);
    run(parts.count, [&](int part) {
        float* const of_part = room + part * 2 * m;
        kernels().exponentials(tile, parts.begin(part), parts.end(part), anchor, row_sum,
                               column_sum ? of_part : nullptr, of_part + m, biases);
    });
    if (column_sum) add_columns(parts, room, 2 * m, m, column_sum);
}

double weigh(int64_t rows, int64_t columns, const float* E, int64_t E_stride, float scale,
             const float* u, const float* v, float* out, int64_t out_stride, int threads,
             const Biases* biases) {
    const Parts parts(rows, columns, threads);
    std::vector<double> totals(parts.count);
    const size_t m = static_cast<size_t>(columns);
    // with biases the columns of each part, and its scratch
    float* const room = scratch(biases ? parts.count * 2 * m : 0);
    std::fill_n(room, biases ? parts.count * 2 * m : 0, 0.0f);
    run(parts.count, [&](int part) {
        const int64_t first = parts.begin(part);
        float* const of_part = room + (biases ? part * 2 * m : 0);
        const Biases of_rows = biases_from(biases, first, of_part);
        totals[part] = kernels().weigh(parts.end(part) - first, columns, E + first * E_stride,
                                       E_stride, scale, u + first, v, out + first * out_stride,
                                       out_stride, biases ? of_part + m : nullptr,
                                       biases ? &of_rows : nullptr);
    });
    if (biases) add_columns(parts, room, 2 * m, m, biases->column_sum);
    double total = 0;
    for (double one : totals) total += one;
    return total;
}

void begin_rows(const Tile& tile, float* row_max, Running running, float* dot, int threads) {
    const Parts parts(tile.rows, tile.columns, threads);
    run(parts.count, [&](int part) {
        kernels().begin_rows(tile, parts.begin(part), parts.end(part), row_max, running, dot);
    });
}

void end_rows(const Tile& tile, const float* row_max, const float* running_max,
              const float* factor, float* out, int64_t out_stride, int threads) {
    const Parts parts(tile.rows, tile.columns, threads);
    run(parts.count, [&](int part) {
        kernels().end_rows(tile, parts.begin(part), parts.end(part), row_max, running_max, factor,
                           out, out_stride);
    });
}

void sigmoid(const Tile& tile, const float* weight, float* row_sum, Sums* sums, int threads,
             bool positive_ids) {
    const Parts parts(tile.rows, tile.columns, threads);
    std::vector<Sums> of_parts(parts.count);
    const bool is_signed = positive_ids && tile.row_id;
    // the signs of one row, of each part
    float* const room = scratch(is_signed ? parts.count * tile.columns : 0);
    run(parts.count, [&](int part) {
        kernels().sigmoid(tile, parts.begin(part), parts.end(part), weight, row_sum,
                          own(of_parts, part, sums),
                          is_signed ? room + part * tile.columns : nullptr);
    });
    add(of_parts, sums);
}

}  // namespace fastclip
