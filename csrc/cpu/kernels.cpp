// The sweeps. Compiled once for each instruction set, with FASTCLIP_ISA and FASTCLIP_LANES.
#include "kernels.h"
#include "vector.h"

namespace fastclip {
namespace FASTCLIP_ISA {
namespace {

// exp spans e^87 in float32, and e^17 of them hold the terms that still count: where a tile's
// lines lie closer together, one exponential about a common anchor serves rows and columns.
constexpr float SPAN = 66.0f;
// An entry whose gradient is zero, finite: sums of G * S meet it.
constexpr float LEFT_OUT = -1e30f;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline float finite(float anchor) { return anchor == -INFINITE ? 0.0f : anchor; }
inline Floats finite(Floats anchor) { return anchor == -INFINITE ? Floats{} : anchor; }
inline Floats absolute(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

template <class Id>
void set_where_ids_agree(const Tile& tile, int64_t i, float* row, float value) {
    const Id own = static_cast<const Id*>(tile.row_id)[i];
    const Id* const id = static_cast<const Id*>(tile.column_id);
    for (int64_t j = 0; j < tile.columns; ++j) row[j] = id[j] == own ? value : row[j];
}

// The entries of `row` whose column has the id of row i, if there are ids.
void set_group(const Tile& tile, int64_t i, float* row, float value) {
    if (tile.row_id && tile.id_bytes == 4) set_where_ids_agree<int32_t>(tile, i, row, value);
    if (tile.row_id && tile.id_bytes == 8) set_where_ids_agree<int64_t>(tile, i, row, value);
}

// The column of row i's entry on the diagonal, or -1.
int64_t crossing(const Tile& tile, int64_t i) {
    const int64_t j = tile.diagonal == NO_DIAGONAL ? -1 : i + tile.diagonal;
    return j < tile.columns ? j : -1;
}

// Where entries of row i are left out the row becomes logits, and these entries `value`. Returns
// what the row is to be multiplied by.
float leave_out(const Tile& tile, int64_t i, float value) {
    const int64_t j = crossing(tile, i);
    if (j < 0 && !tile.row_id) return tile.scale;
    float* const row = tile.data + i * tile.stride;
    along(tile.columns, [&](int64_t k, auto lanes) {
        lanes.store(row + k, lanes.load(row + k) * tile.scale);
    });
    if (j >= 0) row[j] = value;
    set_group(tile, i, row, value);
    return 1.0f;
}

// Sums are about `anchor` or, without one, about the lines' own maxima.
void merge_about(int64_t n, Running running, Running other, const float* anchor, float offset) {
    along(n, [&](int64_t k, auto lanes) {
        const Floats max = lanes.load(running.max + k);
        const Floats other_max = lanes.load(other.max + k) + offset;
        const Floats other_anchor = anchor ? all(*anchor + offset) : other_max;
        Floats merged = larger(max, other_max);
        const Floats about = finite(merged);
        const Floats sum = lanes.load(running.sum + k) * exp(max - about) +
                           lanes.load(other.sum + k) * exp(smaller(other_anchor - about, all(SPAN)));
        merged = sum == sum ? merged : sum;
        lanes.store(running.max + k, merged);
        lanes.store(running.sum + k, sum);
    });
}

void merge(int64_t n, Running running, Running other) {
    merge_about(n, running, other, nullptr, 0.0f);
}

// Some rows of a strip and what they are to be multiplied by.
struct Strip {
    const Tile& tile;
    int64_t begin, rows;
    float scale[STRIP];

    const float* row(int64_t i) const { return tile.data + (begin + i) * tile.stride; }
};

// R rows at a time share the loads and stores of their columns' results.
template <int R, bool COLUMNS>
void maxima(const Strip& strip, int64_t first, float* row_max, float* column_max) {
    Floats greatest[R];
    for (int r = 0; r < R; ++r) greatest[r] = all(-INFINITE);
    along(strip.tile.columns, [&](int64_t j, auto lanes) {
        Floats column = all(-INFINITE);
        for (int r = 0; r < R; ++r) {
            Floats logit = lanes.load(strip.row(first + r) + j) * strip.scale[first + r];
            logit = lanes.inside(logit, -INFINITE);
            greatest[r] = larger(logit, greatest[r]);
            if (COLUMNS) column = larger(logit, column);
        }
        if (COLUMNS) lanes.store(column_max + j, larger(column, lanes.load(column_max + j)));
    });
    for (int r = 0; r < R; ++r) row_max[first + r] = max_of(greatest[r]);
}

template <int R, bool COLUMNS>
void exponentials(const Strip& strip, int64_t first, const float* anchor, float* row_sum,
                  float* column_sum) {
    Floats sum[R];
    for (int r = 0; r < R; ++r) sum[r] = Floats{};
    along(strip.tile.columns, [&](int64_t j, auto lanes) {
        Floats column{};
        for (int r = 0; r < R; ++r) {
            const Floats logit = lanes.load(strip.row(first + r) + j) * strip.scale[first + r];
            const Floats e = lanes.inside(exp(logit - anchor[first + r]), 0.0f);
            sum[r] += e;
            if (COLUMNS) column += e;
        }
        if (COLUMNS) lanes.store(column_sum + j, column + lanes.load(column_sum + j));
    });
    for (int r = 0; r < R; ++r) row_sum[first + r] = sum_of(sum[r]);
}

// Where lines lie far apart: exponentials of the columns' own.
void column_exponentials(const Strip& strip, int64_t i, const float* max, float* sum) {
    along(strip.tile.columns, [&](int64_t j, auto lanes) {
        const Floats logit = lanes.load(strip.row(i) + j) * strip.scale[i];
        const Floats e = exp(logit - finite(lanes.load(max + j)));
        lanes.store(sum + j, lanes.load(sum + j) + e);
    });
}

template <int N>
struct Count {
    static constexpr int value = N;
};

template <class Group>
void in_groups(int64_t rows, Group&& group) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) group(i, Count<4>{});
    for (; i < rows; ++i) group(i, Count<1>{});
}

void fill(float* line, int64_t n, float value) {
    along(n, [&](int64_t j, auto lanes) { lanes.store(line + j, all(value)); });
}

// The lowest and the highest of some lines; those at -inf do not count.
struct Span {
    float low = INFINITE, high = -INFINITE;

    void add(const float* line, int64_t n) {
        Floats lows = all(INFINITE), highs = all(-INFINITE);
        along(n, [&](int64_t j, auto lanes) {
            const Floats v = lanes.inside(lanes.load(line + j), -INFINITE);
            highs = larger(v, highs);
            lows = smaller(v == -INFINITE ? all(INFINITE) : v, lows);
        });
        for (int lane = 0; lane < LANES; ++lane) {
            low = lows[lane] < low ? lows[lane] : low;
            high = highs[lane] > high ? highs[lane] : high;
        }
    }
    // whether one exponential serves all; not where there is no line
    bool narrow() const { return low <= high && high - low < SPAN; }
};

// Two logits an entry: nothing is shared.
void biased_statistics(const Tile& tile, const Biases& biases, int64_t begin, int64_t end,
                       Running rows, const Running* columns, float* scratch) {
    const Running strip_columns{scratch, scratch + tile.columns};
    float row_max[STRIP], row_sum[STRIP];
    for (; begin < end; begin += STRIP) {
        Strip strip{tile, begin, least(STRIP, end - begin), {}};
        const auto row_logit = [&](int64_t i, int64_t j, auto lanes) {
            return lanes.load(strip.row(i) + j) * strip.scale[i] + lanes.load(biases.column + j);
        };
        for (int64_t i = 0; i < strip.rows; ++i) {
            strip.scale[i] = leave_out(tile, begin + i, -INFINITE);
            Floats greatest = all(-INFINITE), sum{};
            along(tile.columns, [&](int64_t j, auto lanes) {
                greatest = larger(lanes.inside(row_logit(i, j, lanes), -INFINITE), greatest);
            });
            row_max[i] = max_of(greatest);
            const float anchor = finite(row_max[i]);
            along(tile.columns, [&](int64_t j, auto lanes) {
                sum += lanes.inside(exp(row_logit(i, j, lanes) - anchor), 0.0f);
            });
            row_sum[i] = sum_of(sum);
        }
        const Running own{rows.max + begin, rows.sum + begin};
        merge_about(strip.rows, own, {row_max, row_sum}, nullptr, tile.offset);
        if (!columns) continue;
        const auto column_logit = [&](int64_t i, int64_t j, auto lanes) {
            return lanes.load(strip.row(i) + j) * strip.scale[i] + biases.row[begin + i];
        };
        fill(strip_columns.max, tile.columns, -INFINITE);
        fill(strip_columns.sum, tile.columns, 0.0f);
        for (int64_t i = 0; i < strip.rows; ++i)
            along(tile.columns, [&](int64_t j, auto lanes) {
                float* const max = strip_columns.max + j;
                lanes.store(max, larger(column_logit(i, j, lanes), lanes.load(max)));
            });
        for (int64_t i = 0; i < strip.rows; ++i)
            along(tile.columns, [&](int64_t j, auto lanes) {
                const Floats anchor = finite(lanes.load(strip_columns.max + j));
                float* const sum = strip_columns.sum + j;
                lanes.store(sum, lanes.load(sum) + exp(column_logit(i, j, lanes) - anchor));
            });
        merge_about(tile.columns, *columns, strip_columns, nullptr, tile.offset);
    }
}

void statistics(const Tile& tile, int64_t begin, int64_t end, Running rows,
                const Running* columns, float* scratch, const Biases* biases) {
    if (biases) return biased_statistics(tile, *biases, begin, end, rows, columns, scratch);
    float row_max[STRIP], row_sum[STRIP], anchor[STRIP];
    const Running strip_columns{scratch, scratch + tile.columns};
    for (; begin < end; begin += STRIP) {
        Strip strip{tile, begin, least(STRIP, end - begin), {}};
        const Running strip_rows{row_max, row_sum};
        const Running own{rows.max + begin, rows.sum + begin};
        for (int64_t i = 0; i < strip.rows; ++i)
            strip.scale[i] = leave_out(tile, begin + i, -INFINITE);
        if (!columns) {
            in_groups(strip.rows, [&](int64_t i, auto count) {
                constexpr int R = decltype(count)::value;
                maxima<R, false>(strip, i, row_max, nullptr);
                for (int r = 0; r < R; ++r) anchor[i + r] = finite(row_max[i + r]);
                exponentials<R, false>(strip, i, anchor, row_sum, nullptr);
            });
            merge_about(strip.rows, own, strip_rows, nullptr, tile.offset);
            continue;
        }
        fill(strip_columns.max, tile.columns, -INFINITE);
        fill(strip_columns.sum, tile.columns, 0.0f);
        in_groups(strip.rows, [&](int64_t i, auto count) {
            maxima<decltype(count)::value, true>(strip, i, row_max, strip_columns.max);
        });
        Span span;
        span.add(row_max, strip.rows);
        span.add(strip_columns.max, tile.columns);
        const bool narrow = span.narrow();
        for (int64_t i = 0; i < strip.rows; ++i)
            anchor[i] = narrow ? span.high : finite(row_max[i]);
        in_groups(strip.rows, [&](int64_t i, auto count) {
            constexpr int R = decltype(count)::value;
            if (narrow) {
                exponentials<R, true>(strip, i, anchor, row_sum, strip_columns.sum);
                return;
            }
            exponentials<R, false>(strip, i, anchor, row_sum, nullptr);
            for (int r = 0; r < R; ++r)
                column_exponentials(strip, i + r, strip_columns.max, strip_columns.sum);
        });
        const float* const about = narrow ? &span.high : nullptr;
        merge_about(strip.rows, own, strip_rows, about, tile.offset);
        merge_about(tile.columns, *columns, strip_columns, about, tile.offset);
    }
}

// What a line brings to a gradient: its log-sum-exp less the offset, and its weight times scale.
struct Anchors {
    float* anchor;
    float* weight;

    void set(Lines lines, int64_t n, const Tile& tile) const {
        along(n, [&](int64_t j, auto lanes) {
            lanes.store(anchor + j, lanes.load(lines.lse + j) - tile.offset);
            lanes.store(weight + j, lanes.load(lines.weight + j) * tile.scale);
        });
    }
    // weights become those of exp(S - low); no line with entries lies below
    void move_to(float low, int64_t n) const {
        along(n, [&](int64_t j, auto lanes) {
            // in this order a line without a log-sum-exp keeps its NaN
            const Floats away = smaller(Floats{}, low - lanes.load(anchor + j));
            lanes.store(weight + j, lanes.load(weight + j) * exp(away));
        });
    }
    void make_finite(int64_t n) const {
        along(n, [&](int64_t j, auto lanes) {
            lanes.store(anchor + j, finite(lanes.load(anchor + j)));
        });
    }
};

enum class Way { ROWS, SHARED, APART };

template <Way WAY, bool SUMS>
void gradient_row(const Tile& tile, float* row, float scale, float anchor, float weight,
                  const Anchors& columns, Floats& dot, Floats& total) {
    along(tile.columns, [&](int64_t j, auto lanes) {
        const Floats logit = lanes.load(row + j) * scale;
        Floats g = exp(logit - anchor);
        if constexpr (WAY == Way::SHARED) g *= lanes.load(columns.weight + j) + weight;
        if constexpr (WAY != Way::SHARED) g *= weight;
        if constexpr (WAY == Way::APART)
            g += exp(logit - lanes.load(columns.anchor + j)) * lanes.load(columns.weight + j);
        lanes.store(row + j, g);
        if constexpr (SUMS) {
            g = lanes.inside(g, 0.0f);
            total += g;
            // what a table has left out is at -inf, and 0 * -inf would be NaN
            dot += g * larger(logit, all(LEFT_OUT));
        }
    });
}

template <Way WAY, bool SUMS>
void gradient_rows(const Tile& tile, int64_t begin, int64_t end, const Anchors& rows, float low,
                   const Anchors& columns, Sums* sums) {
    double dots = 0, totals = 0;
    for (int64_t group = begin; group < end; group += 4) {
        Floats dot{}, total{};
        for (int64_t i = group; i < least(group + 4, end); ++i) {
            const float scale = leave_out(tile, i, LEFT_OUT);
            const float anchor = WAY == Way::SHARED ? low : rows.anchor[i - begin];
            gradient_row<WAY, SUMS>(tile, tile.data + i * tile.stride, scale, anchor,
                                    rows.weight[i - begin], columns, dot, total);
        }
        if (SUMS) {
            dots += sum_of(dot);
            totals += sum_of(total);
        }
    }
    if (SUMS) {
        sums->dot += dots / tile.scale / tile.scale;
        sums->total += totals / tile.scale;
    }
}

// Adds sums of a strip's rows to those of all, and begins anew: a long sum of small terms would
// lose them.
void add_strip(int64_t n, float* sum, float* strip, float factor) {
    along(n, [&](int64_t j, auto lanes) {
        lanes.store(sum + j, lanes.load(sum + j) + lanes.load(strip + j) * factor);
        lanes.store(strip + j, Floats{});
    });
}

template <bool COLUMNS>
void biased_gradient_rows(const Tile& tile, const Biases& biases, int64_t begin, int64_t end,
                          const Anchors& rows, const Anchors& columns, float* strip, Sums* sums) {
    double dots = 0, totals = 0;
    fill(strip, tile.columns, 0.0f);
    for (int64_t i = begin; i < end; ++i) {
        const float scale = leave_out(tile, i, LEFT_OUT);
        const float anchor = rows.anchor[i - begin], weight = rows.weight[i - begin];
        const float bias = biases.row[i];
        float* const row = tile.data + i * tile.stride;
        Floats dot{}, total{}, of_columns{};
        along(tile.columns, [&](int64_t j, auto lanes) {
            const Floats logit = lanes.load(row + j) * scale;
            Floats g = exp(logit + lanes.load(biases.column + j) - anchor) * weight;
            lanes.store(strip + j, lanes.load(strip + j) + g);
            if constexpr (COLUMNS) {
                const Floats own = exp(logit + bias - lanes.load(columns.anchor + j)) *
                                   lanes.load(columns.weight + j);
                of_columns += lanes.inside(own, 0.0f);
                g += own;
            }
            lanes.store(row + j, g);
            g = lanes.inside(g, 0.0f);
            total += g;
            // what a table has left out is at -inf, and 0 * -inf would be NaN
            dot += g * larger(logit, all(LEFT_OUT));
        });
        if (COLUMNS) biases.row_sum[i] += sum_of(of_columns) / tile.scale;
        dots += sum_of(dot);
        totals += sum_of(total);
        if ((i - begin) % STRIP == STRIP - 1 || i == end - 1)
            add_strip(tile.columns, biases.column_sum, strip, 1.0f / tile.scale);
    }
    if (!sums) return;
    sums->dot += dots / tile.scale / tile.scale;
    sums->total += totals / tile.scale;
}

void gradient(const Tile& tile, int64_t begin, int64_t end, Lines rows, const Lines* columns,
              float* scratch, Sums* sums, const Biases* biases) {
    const int64_t m = tile.columns, n = end - begin;
    const Anchors of_rows{scratch, scratch + n}, of_columns{scratch + 2 * n, scratch + 2 * n + m};
    of_rows.set({rows.lse + begin, rows.weight + begin}, n, tile);
    if (columns) of_columns.set(*columns, m, tile);
    if (biases) {
        of_rows.make_finite(n);
        if (columns) of_columns.make_finite(m);
        auto sweep = columns ? biased_gradient_rows<true> : biased_gradient_rows<false>;
        sweep(tile, *biases, begin, end, of_rows, of_columns, scratch + 2 * (n + m), sums);
        return;
    }
    Span span;
    if (columns) {
        // no logit lies above its lines' log-sum-exps, so none is far above the lowest
        span.add(of_rows.anchor, n);
        span.add(of_columns.anchor, m);
    }
    auto sweep = sums ? gradient_rows<Way::ROWS, true> : gradient_rows<Way::ROWS, false>;
    if (columns && span.narrow()) {
        of_rows.move_to(span.low, n);
        of_columns.move_to(span.low, m);
        sweep = sums ? gradient_rows<Way::SHARED, true> : gradient_rows<Way::SHARED, false>;
    } else {
        of_rows.make_finite(n);
        if (columns) {
            of_columns.make_finite(m);
            sweep = sums ? gradient_rows<Way::APART, true> : gradient_rows<Way::APART, false>;
        }
    }
    sweep(tile, begin, end, of_rows, span.low, of_columns, sums);
}

template <int R, bool COLUMNS, bool BIASED>
void exponential_rows(const Strip& strip, int64_t first, float anchor, float* row_sum,
                      float* column_sum, const Biases* biases) {
    Floats sum[R];
    for (int r = 0; r < R; ++r) sum[r] = Floats{};
    along(strip.tile.columns, [&](int64_t j, auto lanes) {
        Floats column{};
        for (int r = 0; r < R; ++r) {
            float* const entry = strip.tile.data + (strip.begin + first + r) * strip.tile.stride + j;
            const Floats e = exp_or_infinite(lanes.load(entry) * strip.scale[first + r] - anchor);
            lanes.store(entry, e);
            if constexpr (BIASED) {
                sum[r] += lanes.inside(e * lanes.load(biases->column + j), 0.0f);
                if (COLUMNS) column += e * biases->row[strip.begin + first + r];
            } else {
                sum[r] += lanes.inside(e, 0.0f);
                if (COLUMNS) column += e;
            }
        }
        if (COLUMNS) lanes.store(column_sum + j, column + lanes.load(column_sum + j));
    });
    for (int r = 0; r < R; ++r) row_sum[first + r] += sum_of(sum[r]);
}

template <bool BIASED>
void exponentials_of(const Tile& tile, int64_t begin, int64_t end, float anchor, float* row_sum,
                     float* column_sum, float* scratch, const Biases* biases) {
    const float about = anchor - tile.offset;
    for (; begin < end; begin += STRIP) {
        Strip strip{tile, begin, least(STRIP, end - begin), {}};
        for (int64_t i = 0; i < strip.rows; ++i)
            strip.scale[i] = leave_out(tile, begin + i, -INFINITE);
        // sums of a strip's columns first: a long sum of small terms would lose them
        if (column_sum) fill(scratch, tile.columns, 0.0f);
        in_groups(strip.rows, [&](int64_t i, auto count) {
            constexpr int R = decltype(count)::value;
            if (column_sum)
                exponential_rows<R, true, BIASED>(strip, i, about, row_sum + begin, scratch, biases);
            else
                exponential_rows<R, false, BIASED>(strip, i, about, row_sum + begin, nullptr,
                                                   biases);
        });
        if (!column_sum) continue;
        along(tile.columns, [&](int64_t j, auto lanes) {
            lanes.store(column_sum + j, lanes.load(column_sum + j) + lanes.load(scratch + j));
        });
    }
}

void exponentials(const Tile& tile, int64_t begin, int64_t end, float anchor, float* row_sum,
                  float* column_sum, float* scratch, const Biases* biases) {
    (biases ? exponentials_of<true> : exponentials_of<false>)(tile, begin, end, anchor, row_sum,
                                                              column_sum, scratch, biases);
}

double biased_weigh(int64_t rows, int64_t columns, const float* E, int64_t E_stride, float scale,
                    const float* u, const float* v, float* out, int64_t out_stride, float* strip,
                    const Biases& biases) {
    double total = 0;
    fill(strip, columns, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
        const float* const from = E + i * E_stride;
        float* const to = out + i * out_stride;
        Floats sum{}, of_columns{};
        along(columns, [&](int64_t j, auto lanes) {
            const Floats e = lanes.load(from + j);
            // E with its bias first: by itself neither need be in range times the other's factor
            Floats g = e * lanes.load(biases.column + j) * u[i];
            lanes.store(strip + j, lanes.load(strip + j) + g);
            if (v) {
                const Floats own = lanes.inside(e * biases.row[i] * lanes.load(v + j), 0.0f);
                of_columns += own;
                g += own;
            }
            lanes.store(to + j, g * scale);
            sum += lanes.inside(g, 0.0f);
        });
        biases.row_sum[i] += sum_of(of_columns);
        total += sum_of(sum);
        if (i % STRIP == STRIP - 1 || i == rows - 1)
            add_strip(columns, biases.column_sum, strip, 1.0f);
    }
    return total;
}

double weigh(int64_t rows, int64_t columns, const float* E, int64_t E_stride, float scale,
             const float* u, const float* v, float* out, int64_t out_stride, float* scratch,
             const Biases* biases) {
    if (biases)
        return biased_weigh(rows, columns, E, E_stride, scale, u, v, out, out_stride, scratch,
                            *biases);
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
        const float* const from = E + i * E_stride;
        float* const to = out + i * out_stride;
        Floats sum{};
        along(columns, [&](int64_t j, auto lanes) {
            const Floats factor = v ? lanes.load(v + j) + u[i] : all(u[i]);
            const Floats g = lanes.load(from + j) * (factor * scale);
            lanes.store(to + j, g);
            sum += lanes.inside(g, 0.0f);
        });
        total += sum_of(sum);
    }
    return total / scale;
}

void begin_rows(const Tile& tile, int64_t begin, int64_t end, float* row_max, Running running,
                float* dot) {
    for (int64_t i = begin; i < end; ++i) {
        Strip strip{tile, i, 1, {leave_out(tile, i, -INFINITE)}};
        maxima<1, false>(strip, 0, row_max + i, nullptr);
        const float max = finite(row_max[i]);
        float* const row = tile.data + i * tile.stride;
        Floats sums{}, dots{};
        along(tile.columns, [&](int64_t j, auto lanes) {
            const Floats below = lanes.load(row + j) * strip.scale[0] - max;
            const Floats e = exp(below);
            lanes.store(row + j, e);
            sums += lanes.inside(e, 0.0f);
            // what is left out is at -inf, and 0 * -inf would be NaN
            dots += lanes.inside(e * (below < -100.0f ? all(-100.0f) : below), 0.0f);
        });
        float sum = sum_of(sums), sum_S = sum_of(dots) + max * sum;
        const float merged = running.max[i] > row_max[i] ? running.max[i] : row_max[i];
        const float about = finite(merged);
        const float before = exp(all(running.max[i] - about))[0];
        const float now = exp(all(row_max[i] - about))[0];
        sum = running.sum[i] * before + sum * now;
        running.sum[i] = sum;
        running.max[i] = sum == sum ? merged : sum;
        dot[i] = dot[i] * before + sum_S * now / tile.scale;
    }
}

void end_rows(const Tile& tile, int64_t begin, int64_t end, const float* row_max,
              const float* running_max, const float* factor, float* out, int64_t out_stride) {
    for (int64_t i = begin; i < end; ++i) {
        const float* const from = tile.data + i * tile.stride;
        float* const to = out + i * out_stride;
        const float f = factor[i] * exp(all(row_max[i] - finite(running_max[i])))[0];
        along(tile.columns, [&](int64_t j, auto lanes) {
            lanes.store(to + j, lanes.load(from + j) * f);
        });
    }
}

// 1 for a negative, -1 for a positive of the row's group. What is left out is as a negative.
void set_signs(const Tile& tile, int64_t i, float* signs) {
    fill(signs, tile.columns, 1.0f);
    set_group(tile, i, signs, -1.0f);
    if (const int64_t j = crossing(tile, i); j >= 0) signs[j] = 1.0f;
}

template <bool GRADIENT, bool SIGNED>
void sigmoid_rows(const Tile& tile, int64_t begin, int64_t end, const float* weight,
                  float* row_sum, Sums* sums, float* signs) {
    double dots = 0, totals = 0;
    Tile without_ids = tile;
    without_ids.row_id = nullptr;
    for (int64_t i = begin; i < end; ++i) {
        const float scale = leave_out(SIGNED ? without_ids : tile, i, LEFT_OUT);
        if (SIGNED) set_signs(tile, i, signs);
        float* const row = tile.data + i * tile.stride;
        const float w = GRADIENT ? weight[i] * tile.scale : 0.0f;
        Floats softplus{}, dot{}, total{};
        along(tile.columns, [&](int64_t j, auto lanes) {
            const Floats logit = lanes.load(row + j) * scale;
            Floats z = logit + tile.offset;
            if constexpr (SIGNED) z *= lanes.load(signs + j);
            const Floats e = exp(-absolute(z));
            softplus += lanes.inside(larger(z, Floats{}) + log1p(e), 0.0f);
            if constexpr (GRADIENT) {
                Floats g = (z < 0.0f ? e : all(1.0f)) * w / (1.0f + e);
                if constexpr (SIGNED) g *= lanes.load(signs + j);
                lanes.store(row + j, g);
                g = lanes.inside(g, 0.0f);
                total += g;
                dot += g * larger(logit, all(LEFT_OUT));
            }
        });
        row_sum[i] += sum_of(softplus);
        if (GRADIENT) {
            dots += sum_of(dot);
            totals += sum_of(total);
        }
    }
    if (GRADIENT) {
        sums->dot += dots / tile.scale / tile.scale;
        sums->total += totals / tile.scale;
    }
}

void sigmoid(const Tile& tile, int64_t begin, int64_t end, const float* weight, float* row_sum,
             Sums* sums, float* signs) {
    auto sweep = sums ? sigmoid_rows<true, false> : sigmoid_rows<false, false>;
    if (signs) sweep = sums ? sigmoid_rows<true, true> : sigmoid_rows<false, true>;
    sweep(tile, begin, end, weight, row_sum, sums, signs);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{FASTCLIP_NAME, statistics, merge,    gradient, exponentials,
                      weigh,         begin_rows, end_rows, sigmoid};

}  // namespace FASTCLIP_ISA
}  // namespace fastclip
