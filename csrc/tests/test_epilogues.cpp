// Every instruction set that this machine has, against the definitions in double; the same bits
// for repeats; calls from several threads and from a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/pool.h"
#include "fastclip/epilogues.h"
#include "tests/expect.h"

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN
#endif
#endif

using namespace fastclip;
using expected::expect;
using expected::near;

namespace {

using Line = std::vector<float>;
constexpr float INF = std::numeric_limits<float>::infinity();

// Random cosines in a matrix with a stride, entries left out by a diagonal or by ids, or biases.
struct Problem {
    int64_t rows, columns, stride;
    float scale, offset;
    Line data;
    std::vector<int32_t> row_id, column_id;
    int64_t diagonal = NO_DIAGONAL;
    Line row_bias, column_bias;
    mutable Line row_sum, column_sum;

    Problem(int64_t rows, int64_t columns, float scale, float offset = 0)
        : rows(rows), columns(columns), stride(columns + 3), scale(scale), offset(offset),
          data(rows * stride) {
        std::mt19937 random(static_cast<unsigned>(rows * 1000 + columns));
        std::normal_distribution<float> normal(0.0f, 0.25f);
        for (float& entry : data) entry = normal(random);
    }
    void use_ids() {
        for (int64_t i = 0; i < rows; ++i) row_id.push_back(static_cast<int32_t>(i % 7));
        for (int64_t j = 0; j < columns; ++j) column_id.push_back(static_cast<int32_t>(j % 11));
    }
    // both at most 0, as far apart as logarithms of frequencies; one of columns leaves it out
    void use_biases() {
        for (int64_t i = 0; i < rows; ++i) row_bias.push_back(-0.3f * static_cast<float>(i % 13));
        for (int64_t j = 0; j < columns; ++j)
            column_bias.push_back(j % 19 == 2 ? -INF : -0.5f * static_cast<float>(j % 17));
    }
    // With sums that begin at 0, as they are or, where exponentials are kept, theirs.
    Biases biases(Line& row, Line& column, bool exponentials = false) const {
        if (row_bias.empty()) return {};
        row = row_bias, column = column_bias;
        for (Line* const line : {&row, &column})
            for (float& bias : *line) bias = exponentials ? std::exp(bias) : bias;
        row_sum.assign(rows, 0.0f), column_sum.assign(columns, 0.0f);
        return {row.data(), column.data(), row_sum.data(), column_sum.data()};
    }
    double bias(int64_t i, int64_t j, bool row) const {
        return row_bias.empty() ? 0.0 : row ? column_bias[j] : row_bias[i];
    }
    Tile tile(Line& room) const {
        room = data;
        Tile made{room.data(), rows, columns, stride, scale, offset, diagonal};
        if (!row_id.empty()) {
            made.row_id = row_id.data();
            made.column_id = column_id.data();
            made.id_bytes = 4;
        }
        return made;
    }
    bool same_id(int64_t i, int64_t j) const {
        return !row_id.empty() && row_id[i] == column_id[j];
    }
    bool left_out(int64_t i, int64_t j) const { return j == i + diagonal || same_id(i, j); }
    double cosine(int64_t i, int64_t j) const { return data[i * stride + j]; }
    double logit(int64_t i, int64_t j) const { return scale * cosine(i, j) + offset; }
    // in a row's softmax, or a column's
    double logit(int64_t i, int64_t j, bool row) const { return logit(i, j) + bias(i, j, row); }
};

double lse_of(const Problem& p, int64_t line, bool row) {
    std::vector<double> logits;
    for (int64_t k = 0; k < (row ? p.columns : p.rows); ++k) {
        const int64_t i = row ? line : k, j = row ? k : line;
        if (!p.left_out(i, j)) logits.push_back(p.logit(i, j, row));
    }
    if (logits.empty()) return -INF;
    const double max = *std::max_element(logits.begin(), logits.end());
    if (max == -INF) return max;
    double sum = 0;
    for (double logit : logits) sum += std::exp(logit - max);
    return max + std::log(sum);
}

struct Found {
    Line row_max, row_sum, column_max, column_sum, G;
    Sums sums;
};

Found statistics_of(const Problem& p, int threads) {
    Found found{Line(p.rows, -INF), Line(p.rows), Line(p.columns, -INF), Line(p.columns), {}, {}};
    Line room, row_bias, column_bias;
    const Running columns{found.column_max.data(), found.column_sum.data()};
    const Biases biases = p.biases(row_bias, column_bias);
    statistics(p.tile(room), {found.row_max.data(), found.row_sum.data()}, &columns, threads,
               p.row_bias.empty() ? nullptr : &biases);
    return found;
}

void check_statistics(const Problem& p, int threads) {
    const Found found = statistics_of(p, threads);
    for (int64_t i = 0; i < p.rows; ++i) {
        double greatest = -INF;
        for (int64_t j = 0; j < p.columns; ++j)
            if (!p.left_out(i, j)) greatest = std::fmax(greatest, p.logit(i, j, true));
        const double size = std::fabs(p.scale) + 1;
        near(found.row_max[i], greatest, 1e-6 * size, "row max");
        near(std::log(found.row_sum[i]) + (found.row_sum[i] > 0 ? found.row_max[i] : 0),
             lse_of(p, i, true), 2e-6 * size, "row lse");
    }
    for (int64_t j = 0; j < p.columns; ++j)
        near(std::log(found.column_sum[j]) + (found.column_sum[j] > 0 ? found.column_max[j] : 0),
             lse_of(p, j, false), 2e-6 * (std::fabs(p.scale) + 1), "column lse");
}

// What was found of the biases' gradients.
void check_sums(const Problem& p, const std::vector<double>& by_row,
                const std::vector<double>& by_column) {
    if (p.row_bias.empty()) return;
    const double rounding = 2e-6 * (std::fabs(p.scale) + 1);
    for (int64_t i = 0; i < p.rows; ++i)
        near(p.row_sum[i], by_row[i], rounding * by_row[i] + 1e-30, "gradient by a row's bias");
    for (int64_t j = 0; j < p.columns; ++j)
        near(p.column_sum[j], by_column[j], rounding * by_column[j] + 1e-30,
             "gradient by a column's bias");
}

void check_gradient(const Problem& p, bool both, int threads) {
    Line row_lse, row_weight, column_lse, column_weight, room;
    for (int64_t i = 0; i < p.rows; ++i) {
        row_lse.push_back(static_cast<float>(lse_of(p, i, true)));
        row_weight.push_back(0.5f + 0.01f * static_cast<float>(i % 10));
    }
    for (int64_t j = 0; j < p.columns; ++j) {
        column_lse.push_back(static_cast<float>(lse_of(p, j, false)));
        column_weight.push_back(0.2f + 0.03f * static_cast<float>(j % 10));
    }
    const Tile tile = p.tile(room);
    const Lines columns{column_lse.data(), column_weight.data()};
    Sums sums;
    Line row_bias, column_bias;
    const Biases biases = p.biases(row_bias, column_bias);
    gradient(tile, {row_lse.data(), row_weight.data()}, both ? &columns : nullptr, &sums, threads,
             p.row_bias.empty() ? nullptr : &biases);
    double dot = 0, total = 0, size = 0;
    std::vector<double> by_row(p.rows), by_column(p.columns);
    for (int64_t i = 0; i < p.rows; ++i) {
        for (int64_t j = 0; j < p.columns; ++j) {
            double want = 0;
            if (!p.left_out(i, j)) {
                const double of_row = p.logit(i, j, true), of_column = p.logit(i, j, false);
                if (of_row > -INF) want = row_weight[i] * std::exp(of_row - row_lse[i]);
                by_column[j] += want;
                const double own = column_weight[j] * std::exp(of_column - column_lse[j]);
                if (both) want += own, by_row[i] += own;
            }
            dot += want * p.cosine(i, j);
            total += want;
            size += std::fabs(want);
            near(room[i * p.stride + j], p.scale * want,
                 2e-6 * std::fabs(p.scale * want) * (std::fabs(p.scale) + 1) + 1e-30, "G");
        }
        for (int64_t j = p.columns; j < p.stride; ++j)
            expect(room[i * p.stride + j] == p.data[i * p.stride + j], "written beside the tile");
    }
    near(sums.dot, dot, 3e-6 * size, "sum of G * cos");
    near(sums.total, total, 3e-6 * size, "sum of G");
    check_sums(p, by_row, by_column);
}

void check_kept(const Problem& p, int threads) {
    const float anchor = std::fabs(p.scale) / 2;
    Line room, row_sum(p.rows, 1.0f), column_sum(p.columns, 2.0f), alone(p.rows, 1.0f), other;
    Line row_bias, column_bias;
    const Biases weights = p.biases(row_bias, column_bias, true);
    const Biases* const biases = p.row_bias.empty() ? nullptr : &weights;
    exponentials(p.tile(room), anchor, row_sum.data(), column_sum.data(), threads, biases);
    exponentials(p.tile(other), anchor, alone.data(), nullptr, threads, biases);
    expect(room == other && row_sum == alone, "sums of columns change nothing else");
    std::vector<double> rows(p.rows, 1.0), columns(p.columns, 2.0);
    for (int64_t i = 0; i < p.rows; ++i) {
        for (int64_t j = 0; j < p.columns; ++j) {
            const double e = p.left_out(i, j) ? 0 : std::exp(p.logit(i, j) - anchor);
            near(room[i * p.stride + j], e, 1e-6 * e * (std::fabs(p.scale) + 1) + 1e-37, "kept E");
            rows[i] += e * std::exp(p.bias(i, j, true));
            columns[j] += e * std::exp(p.bias(i, j, false));
        }
    }
    const double rounding = 2e-6 * (std::fabs(p.scale) + 1);
    for (int64_t i = 0; i < p.rows; ++i)
        near(row_sum[i], rows[i], rounding * rows[i], "row sum of E");
    for (int64_t j = 0; j < p.columns; ++j)
        near(column_sum[j], columns[j], rounding * columns[j], "column sum of E");
    Line u(p.rows, 0.5f), v(p.columns), G(p.rows * p.columns);
    for (int64_t j = 0; j < p.columns; ++j) v[j] = 0.01f * static_cast<float>(j);
    for (const float* const of_columns : {static_cast<const float*>(v.data()),
                                          static_cast<const float*>(nullptr)}) {
        const double total = weigh(p.rows, p.columns, room.data(), p.stride, p.scale, u.data(),
                                   of_columns, G.data(), p.columns, threads, biases);
        double want = 0, size = 0;
        std::vector<double> by_row(p.rows), by_column(p.columns);
        for (int64_t i = 0; i < p.rows; ++i) {
            for (int64_t j = 0; j < p.columns; ++j) {
                const double e = room[i * p.stride + j];
                const double of_row = e * u[i] * std::exp(p.bias(i, j, true));
                const double own = of_columns ? e * v[j] * std::exp(p.bias(i, j, false)) : 0.0;
                const double g = of_row + own;
                by_column[j] += of_row;
                by_row[i] += own;
                near(G[i * p.columns + j], p.scale * g, 1e-6 * std::fabs(p.scale * g) + 1e-37,
                     "G of kept E");
                want += g;
                size += std::fabs(g);
            }
        }
        near(total, want, 3e-6 * size, "sum of G of kept E");
        check_sums(p, by_row, by_column);
        p.biases(row_bias, column_bias, true);
    }
}

void check_rows(const Problem& p, int threads) {
    Line row_max(p.rows), max(p.rows, -INF), sum(p.rows), dot(p.rows), room, factor(p.rows, 2.0f);
    const Tile tile = p.tile(room);
    begin_rows(tile, row_max.data(), {max.data(), sum.data()}, dot.data(), threads);
    end_rows(tile, row_max.data(), max.data(), factor.data(), tile.data, tile.stride, threads);
    for (int64_t i = 0; i < p.rows; ++i) {
        double want = 0;
        for (int64_t j = 0; j < p.columns; ++j) {
            const double e = p.left_out(i, j) ? 0 : std::exp(p.logit(i, j) - max[i]);
            near(room[i * p.stride + j], 2 * e, 2e-5 * e + 1e-30, "E");
            want += e * p.cosine(i, j);
        }
        near(dot[i], want, 1e-5 * (sum[i] + 1), "sum of E * cos");
        near(std::log(sum[i]) + (sum[i] > 0 ? max[i] : 0), lse_of(p, i, true), 1e-4, "row lse");
    }
}

// Entries whose ids agree are left out or, with `positive_ids`, have -S and -G.
void check_sigmoid(const Problem& p, int threads, bool positive_ids = false) {
    Line weight(p.rows, 0.7f), row_sum(p.rows), room, again(p.rows), other;
    Sums sums;
    sigmoid(p.tile(room), weight.data(), row_sum.data(), &sums, threads, positive_ids);
    sigmoid(p.tile(other), weight.data(), again.data(), nullptr, threads, positive_ids);
    double dot = 0, net = 0, total = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
        double softplus = 0;
        for (int64_t j = 0; j < p.columns; ++j) {
            const bool same = p.same_id(i, j);
            const double sign = positive_ids && same ? -1 : 1, z = sign * p.logit(i, j);
            const bool left_out = j == i + p.diagonal || (same && !positive_ids);
            const double size = left_out ? 0 : 0.7 / (1 + std::exp(-z)), want = sign * size;
            if (!left_out) softplus += std::fmax(z, 0) + std::log1p(std::exp(-std::fabs(z)));
            near(room[i * p.stride + j], p.scale * want,
                 2e-6 * std::fabs(p.scale * want) * (std::fabs(p.scale) + 1) + 1e-30, "G");
            dot += want * p.cosine(i, j);
            net += want;
            total += size;
        }
        near(row_sum[i], softplus, 3e-6 * (softplus + 1), "softplus");
        near(again[i], softplus, 3e-6 * (softplus + 1), "softplus without a gradient");
    }
    near(sums.dot, dot, 3e-6 * (total + 1), "sum of G * cos");
    near(sums.total, net, 3e-6 * (total + 1), "sum of G");
}

// With scale 1 and a maximum of 0, E is the exponential of the tile itself.
void check_exp() {
    Problem p(1, 200001, 1.0f);
    for (int64_t j = 0; j < p.columns; ++j) p.data[j] = -88.0f * static_cast<float>(j) / 2e5f;
    p.data[p.columns - 1] = -INF;
    Line room, row_max(1), max(1, -INF), sum(1), dot(1);
    begin_rows(p.tile(room), row_max.data(), {max.data(), sum.data()}, dot.data(), 1);
    for (int64_t j = 0; j < p.columns; ++j) {
        const double want = p.data[j] < -87.33f ? 0 : std::exp(static_cast<double>(p.data[j]));
        near(room[j], want, want > 0 ? 2e-7 * want : 1.3e-38, "exp");
    }
}

void check_nan() {
    Problem p(9, 40, 14.0f);
    p.data[3 * p.stride + 5] = NAN;
    const Found found = statistics_of(p, 1);
    expect(std::isnan(found.row_max[3]) && std::isnan(found.row_sum[3]), "NaN in a row");
    expect(std::isnan(found.column_max[5]) && std::isnan(found.column_sum[5]), "NaN in a column");
    expect(!std::isnan(found.row_sum[2]) && !std::isnan(found.column_sum[4]), "NaN spreads");
}

bool same(const Found& a, const Found& b) {
    return a.row_max == b.row_max && a.row_sum == b.row_sum && a.column_max == b.column_max &&
           a.column_sum == b.column_sum;
}

void check_threads() {
    const Problem p(517, 513, 20.0f);
    for (int threads : {1, 2, 3, 8}) {
        const Found first = statistics_of(p, threads);
        for (int repeat = 0; repeat < 50; ++repeat)
            expect(same(first, statistics_of(p, threads)), "other bits in a repeat");
    }
    const Found want = statistics_of(p, 3);
    std::vector<std::thread> callers;
    std::vector<int> good(4);
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&, caller] {
            for (int repeat = 0; repeat < 20; ++repeat)
                good[caller] += same(want, statistics_of(p, 3));
        });
    for (std::thread& caller : callers) caller.join();
    for (int count : good) expect(count == 20, "callers side by side");
}

// A child that inherits the pool's bookkeeping but none of its threads.
void check_fork() {
#ifdef UNDER_TSAN
    std::printf("the forked child is left out: this sanitizer allows no threads in it\n");
    return;
#endif
    const Problem p(517, 513, 20.0f);
    const Found want = statistics_of(p, 3);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(same(want, statistics_of(p, 3)) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child");
}

// Stands for an OpenMP runtime's GOMP_parallel.
int teams = 0;
void borrowed(void (*work)(void*), void* context, unsigned threads, unsigned) {
    ++teams;
    expect(threads == 0, "a team of another size than torch's");
    std::vector<std::thread> others;
    for (unsigned i = 1; i < 5; ++i) others.emplace_back(work, context);
    work(context);
    for (std::thread& other : others) other.join();
}

void check_team() {
    const Problem p(517, 513, 20.0f);
    const Found want = statistics_of(p, 3);
    use_team(reinterpret_cast<void*>(&borrowed));
    expect(same(want, statistics_of(p, 3)), "other bits in a team");
    expect(teams == 1, "the team is not used");
    use_team(nullptr);
    statistics_of(p, 3);
    expect(teams == 1, "the team is used when given back");
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// they look at accesses, which the scale hardly changes
const std::vector<float> SCALES{14.3f, 1000.0f};
#else
const std::vector<float> SCALES{0.1f, 14.3f, 100.0f, -20.0f, 1000.0f};
#endif

int main() {
    for (const char* const* name = usable_instructions(); *name; ++name) {
        use_instructions(*name);
        expected::where = *name;
        for (int threads : {1, 3}) {
            for (float scale : SCALES) {
                for (int64_t columns : {1, 5, 16, 67, 300}) {
                    Problem p(65, columns, scale);
                    Problem diagonal = p, grouped = p;
                    diagonal.diagonal = columns / 2 - 40;
                    grouped.use_ids();
                    grouped.diagonal = 0;
                    Problem biased = grouped;
                    biased.use_biases();
                    biased.offset = 2.0f;
                    for (const Problem& each : {p, diagonal, grouped, biased}) {
                        check_statistics(each, threads);
                        check_gradient(each, true, threads);
                        check_gradient(each, false, threads);
                        // exponentials of larger logits are infinite about any anchor
                        if (scale < 200) check_kept(each, threads);
                    }
                    if (scale < 200) check_rows(grouped, threads);
                    Problem shifted = diagonal;
                    shifted.offset = -10.0f;
                    check_sigmoid(shifted, threads);
                    check_gradient(shifted, true, threads);
                    shifted.use_ids();
                    for (bool positive_ids : {false, true})
                        check_sigmoid(shifted, threads, positive_ids);
                }
            }
        }
        // large enough for several parts
        Problem large(600, 700, 30.0f);
        large.diagonal = 11;
        check_statistics(large, 3);
        check_gradient(large, true, 3);
        check_sigmoid(large, 3);
        check_kept(large, 3);
        Problem grouped = large;
        grouped.use_ids();
        check_sigmoid(grouped, 3, true);
        large.use_biases();
        check_statistics(large, 3);
        check_gradient(large, true, 3);
        check_kept(large, 3);
        check_exp();
        check_nan();
        check_threads();
    }
    check_team();
    check_fork();
    return expected::status();
}
