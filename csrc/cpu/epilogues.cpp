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

void add(const std::vector<Sums>& of_parts, Sums* sums) {
    for (const Sums& part : of_parts) {
        if (!sums) return;
        sums->dot += part.dot;
        sums->total += part.total;
    }
}

}  // namespace

void statistics(const Tile& tile, Running rows, const Running* columns, int threads) {
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
        k.statistics(tile, parts.begin(part), parts.end(part), rows, target, of_part + 2 * m);
    });
    for (int part = 0; columns && parts.count > 1 && part < parts.count; ++part) {
        float* const of_part = room + part * 4 * m;
        k.merge(tile.columns, *columns, {of_part, of_part + m});
    }
}

void gradient(const Tile& tile, Lines rows, const Lines* columns, Sums* sums, int threads) {
    const Parts parts(tile.rows, tile.columns, threads);
    const Kernels& k = kernels();
    const size_t size = 2 * static_cast<size_t>(tile.columns + parts.largest());
    float* const room = scratch(parts.count * size);
    std::vector<Sums> of_parts(parts.count);
    run(parts.count, [&](int part) {
        k.gradient(tile, parts.begin(part), parts.end(part), rows, columns, room + part * size,
                   own(of_parts, part, sums));
    });
    add(of_parts, sums);
}

void exponentials(const Tile& tile, float anchor, float* row_sum, float* column_sum,
                  int threads) {
    const Parts parts(tile.rows, tile.columns, threads);
    const size_t m = static_cast<size_t>(tile.columns);
    // the columns of each part, and its scratch
    float* const room = scratch(column_sum ? parts.count * 2 * m : 0);
    std::fill_n(room, column_sum ? parts.count * 2 * m : 0, 0.0f);
    run(parts.count, [&](int part) {
        float* const of_part = room + part * 2 * m;
        kernels().exponentials(tile, parts.begin(part), parts.end(part), anchor, row_sum,
                               column_sum ? of_part : nullptr, of_part + m);
    });
    for (int part = 0; column_sum && part < parts.count; ++part)
        for (size_t j = 0; j < m; ++j) column_sum[j] += room[part * 2 * m + j];
}

double weigh(int64_t rows, int64_t columns, const float* E, int64_t E_stride, float scale,
             const float* u, const float* v, float* out, int64_t out_stride, int threads) {
    const Parts parts(rows, columns, threads);
    std::vector<double> totals(parts.count);
    run(parts.count, [&](int part) {
        const int64_t first = parts.begin(part);
        totals[part] = kernels().weigh(parts.end(part) - first, columns, E + first * E_stride,
                                       E_stride, scale, u + first, v, out + first * out_stride,
                                       out_stride);
    });
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

void sigmoid(const Tile& tile, const float* weight, float* row_sum, Sums* sums, int threads) {
    const Parts parts(tile.rows, tile.columns, threads);
    std::vector<Sums> of_parts(parts.count);
    run(parts.count, [&](int part) {
        kernels().sigmoid(tile, parts.begin(part), parts.end(part), weight, row_sum,
                          own(of_parts, part, sums));
    });
    add(of_parts, sums);
}

}  // namespace fastclip
