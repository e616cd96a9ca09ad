// The CUDA kernels under the emulation, against the definitions in double; the same bits for
// repeats.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulated.cpp"
#include "expect.h"

using namespace fastclip;
using expected::expect;
using expected::near;
using cuda::Matrix;
using cuda::Type;

namespace {

using Line = std::vector<float>;
constexpr float INF = std::numeric_limits<float>::infinity();

// A matrix of any type, with a margin that nobody may write to.
struct Memory {
    int64_t rows, columns, stride;
    Type type;
    std::vector<float> wide;
    std::vector<uint16_t> narrow;

    Memory(int64_t rows, int64_t columns, int64_t stride, Type type)
        : rows(rows), columns(columns), stride(stride), type(type) {
        if (type == Type::F32) wide.assign(rows * stride + 4, 77.0f);
        if (type != Type::F32) narrow.assign(rows * stride + 4, 0x5555);
    }
    Matrix matrix() {
        void* data = wide.data();
        if (type != Type::F32) data = narrow.data();
        return {data, stride, type};
    }
    float at(int64_t i, int64_t j) const {
        const size_t k = i * stride + j;
        if (type == Type::F32) return wide[k];
        if (type == Type::F16) {
            __half value;
            value.bits = narrow[k];
            return static_cast<float>(value);
        }
        __nv_bfloat16 value;
        value.bits = narrow[k];
        return static_cast<float>(value);
    }
    void set(int64_t i, int64_t j, float value) {
        const size_t k = i * stride + j;
        if (type == Type::F32) wide[k] = value;
        if (type == Type::F16) narrow[k] = __half(value).bits;
        if (type == Type::BF16) narrow[k] = __nv_bfloat16(value).bits;
    }
    // relative error of its roundings
    double rounding() const {
        return type == Type::F32 ? 0x1p-24 : type == Type::F16 ? 0x1p-11 : 0x1p-8;
    }
    void check_margin(const std::string& what) const {
        for (size_t k = 0; k < wide.size() + narrow.size(); ++k)
            if (int64_t(k) >= rows * stride || int64_t(k) % stride >= columns)
                expect(wide.empty() ? narrow[k] == 0x5555 : wide[k] == 77.0f,
                       what + ": written beside the tile");
    }
};

// Random cosines, entries left out by a diagonal or by ids, or biases.
struct Problem {
    int64_t rows, columns, stride;
    float scale;
    Line data;
    float offset = 0;
    bool has_offset = false;
    std::vector<int32_t> row_id, column_id;
    std::vector<int64_t> long_row_id, long_column_id;
    int64_t diagonal;
    Line row_bias, column_bias;

    Problem(int64_t rows, int64_t columns, int64_t stride, float scale)
        : rows(rows), columns(columns), stride(stride), scale(scale), data(rows * stride),
          diagonal(columns) {
        std::mt19937 random(static_cast<unsigned>(rows * 1000 + columns));
        std::normal_distribution<float> normal(0.0f, 0.25f);
        for (float& entry : data) entry = normal(random);
    }
    Problem with_diagonal(int64_t where) const {
        Problem other = *this;
        other.diagonal = where;
        return other;
    }
    Problem with_offset(float value) const {
        Problem other = *this;
        other.offset = value;
        other.has_offset = true;
        return other;
    }
    // with every row in one group all is left out
    Problem with_ids(int row_groups, int column_groups, bool wide) const {
        Problem other = *this;
        for (int64_t i = 0; i < rows; ++i) other.row_id.push_back(int32_t(i % row_groups));
        for (int64_t j = 0; j < columns; ++j) other.column_id.push_back(int32_t(j % column_groups));
        if (wide) {
            other.long_row_id.assign(other.row_id.begin(), other.row_id.end());
            other.long_column_id.assign(other.column_id.begin(), other.column_id.end());
        }
        return other;
    }
    // as far apart as logarithms of frequencies; some leave a line out
    Problem with_biases() const {
        Problem other = *this;
        for (int64_t i = 0; i < rows; ++i)
            other.row_bias.push_back(i % 23 == 4 ? -INF : -0.3f * float(i % 13));
        for (int64_t j = 0; j < columns; ++j)
            other.column_bias.push_back(j % 19 == 2 ? -INF : -0.5f * float(j % 17));
        return other;
    }
    Biases biases(float* row_sum = nullptr, float* column_sum = nullptr) const {
        return {row_bias.data(), column_bias.data(), row_sum, column_sum};
    }
    cuda::Tile tile(Memory& room) const {
        room = Memory(rows, columns, stride, Type::F32);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) room.set(i, j, data[i * stride + j]);
        cuda::Tile made{room.wide.data(), rows, columns, stride, &scale,
                        has_offset ? &offset : nullptr, diagonal};
        if (!row_id.empty()) {
            made.row_id = row_id.data();
            made.column_id = column_id.data();
            made.id_bytes = 4;
        }
        if (!long_row_id.empty()) {
            made.row_id = long_row_id.data();
            made.column_id = long_column_id.data();
            made.id_bytes = 8;
        }
        return made;
    }
    bool same_id(int64_t i, int64_t j) const {
        return !row_id.empty() && row_id[i] == column_id[j];
    }
    bool left_out(int64_t i, int64_t j) const { return j == i + diagonal || same_id(i, j); }
    double cosine(int64_t i, int64_t j) const { return data[i * stride + j]; }
    double logit(int64_t i, int64_t j) const { return double{scale} * cosine(i, j) + offset; }
    // in a row's softmax, or a column's
    double logit(int64_t i, int64_t j, bool row) const {
        if (row_bias.empty()) return logit(i, j);
        return logit(i, j) + (row ? column_bias[j] : row_bias[i]);
    }
    // relative error of an exponential: of a logit in float32, and of the anchor's span
    double rounding() const { return 4e-7 * (std::fabs(scale) + std::fabs(offset) + 8); }
};

double max_of(const Problem& p, int64_t line, bool row) {
    double max = -INF;
    for (int64_t k = 0; k < (row ? p.columns : p.rows); ++k) {
        const int64_t i = row ? line : k, j = row ? k : line;
        if (!p.left_out(i, j)) max = std::fmax(max, p.logit(i, j, row));
    }
    return max;
}

double lse_of(const Problem& p, int64_t line, bool row) {
    const double max = max_of(p, line, row);
    double sum = 0;
    for (int64_t k = 0; k < (row ? p.columns : p.rows); ++k) {
        const int64_t i = row ? line : k, j = row ? k : line;
        if (!p.left_out(i, j) && max > -INF) sum += std::exp(p.logit(i, j, row) - max);
    }
    return max == -INF ? -INF : max + std::log(sum);
}

struct Statistics {
    Line max, sum, dot;

    explicit Statistics(int64_t lines) : max(lines, -INF), sum(lines), dot(lines) {}
    Running running() { return {max.data(), sum.data()}; }
    double lse(int64_t line) const {
        return sum[line] > 0 ? max[line] + std::log(sum[line]) : std::log(sum[line]);
    }
};

struct Found {
    Statistics rows, columns;
};

// Tiles with these entries, one after the other: running statistics are merged with others.
Found statistics_of(const std::vector<Problem>& tiles, bool both, bool maxima) {
    Found found{Statistics(tiles[0].rows), Statistics(tiles[0].columns)};
    for (const Problem& p : tiles) {
        Memory room(0, 0, 1, Type::F32);
        const cuda::Tile tile = p.tile(room);
        const int64_t across = tile.pieces_across(), down = tile.pieces_down();
        Statistics rows(across * p.rows), columns(down * p.columns);
        const Biases biases = p.biases();
        cuda::statistics(tile, rows.running(), both ? columns.running() : Running{}, maxima,
                         p.row_bias.empty() ? nullptr : &biases, nullptr);
        cuda::Partials of_columns{};
        if (both)
            of_columns = {down, p.columns, columns.running(), found.columns.running()};
        cuda::merge({across, p.rows, rows.running(), found.rows.running()}, of_columns, nullptr,
                    tile.offset, nullptr, nullptr);
    }
    return found;
}

// Without maxima any number may stand in their place, but for lines without entries.
void check_lines(const Problem& p, const Statistics& found, bool row, int tiles, bool maxima,
                 const std::string& what) {
    for (size_t line = 0; line < found.max.size(); ++line) {
        if (maxima) near(found.max[line], max_of(p, line, row), p.rounding(), what + " max");
        near(found.lse(line), lse_of(p, line, row) + std::log(tiles), p.rounding(), what + " lse");
    }
}

void check_statistics(const Problem& p) {
    for (bool maxima : {true, false}) {
        const int tiles = maxima ? 1 : 2;
        const std::vector<Problem> all(tiles, p);
        const Found both = statistics_of(all, true, maxima);
        check_lines(p, both.rows, true, tiles, maxima, "row");
        check_lines(p, both.columns, false, tiles, maxima, "column");
        check_lines(p, statistics_of(all, false, maxima).rows, true, tiles, maxima, "row alone");
    }
}

// Domain pairs of far apart scales and offsets: neither's sums are lost.
void check_far_tiles() {
    const auto about = [](float scale, float offset, float cosine) {
        Problem p = Problem(9, 20, 20, scale).with_offset(offset);
        for (float& entry : p.data) entry = cosine;
        return p;
    };
    // anchors 31 and -60 with sums near either end of their range: their logits are equal
    const std::vector<Problem> tiles{about(100.0f, 0.0f, -0.125f), about(60.0f, -60.0f, 0.79f)};
    for (bool backwards : {false, true}) {
        std::vector<Problem> order = tiles;
        if (backwards) std::reverse(order.begin(), order.end());
        const Found found = statistics_of(order, true, false);
        for (int64_t line = 0; line < 9; ++line) {
            const double a = lse_of(tiles[0], line, true), b = lse_of(tiles[1], line, true);
            near(found.rows.lse(line), std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b))),
                 1e-4, "lse of far tiles");
        }
    }
}

void check_rows(const Problem& p, Type type) {
    Memory room(0, 0, 1, Type::F32), out(p.rows, p.columns, p.columns + 4, type);
    const cuda::Tile tile = p.tile(room);
    Statistics part(tile.pieces_across() * p.rows), found(p.rows);
    Line factor;
    for (int64_t i = 0; i < p.rows; ++i) factor.push_back(0.5f + 0.25f * float(i % 5));
    cuda::begin_rows(tile, part.running(), part.dot.data(), nullptr);
    room.check_margin("E");
    cuda::merge({tile.pieces_across(), p.rows, part.running(), found.running()}, {},
                part.dot.data(), nullptr, found.dot.data(), nullptr);
    check_lines(p, found, true, 1, true, "kept row");
    cuda::end_rows(tile, part.max.data(), found.max.data(), factor.data(), out.matrix(), nullptr);
    out.check_margin("G of rows");
    for (int64_t i = 0; i < p.rows; ++i) {
        double dot = 0, size = 1e-6;
        const double max = max_of(p, i, true);
        for (int64_t j = 0; j < p.columns; ++j) {
            const double e = p.left_out(i, j) ? 0 : std::exp(p.logit(i, j) - max);
            dot += e * p.cosine(i, j);
            size += e * (std::fabs(p.cosine(i, j)) + 1);
            near(out.at(i, j), factor[i] * e,
                 2 * factor[i] * e * (p.rounding() + out.rounding()) + 1e-30, "G of rows");
        }
        near(found.dot[i], dot, size * p.rounding(), "sum of E * cos");
    }
}

void check_sums(const Line& sums, double dot, double total, double size, double rounding) {
    double found[2] = {0, 0};
    for (size_t k = 0; k < sums.size(); ++k) found[k >= sums.size() / 2] += sums[k];
    near(found[0], dot, size * rounding, "sum of G * cos");
    near(found[1], total, size * rounding, "sum of G");
}

// A sum, and that of its terms' sizes.
struct Sum {
    double sum = 0, size = 0;

    void add(double term) {
        sum += term;
        size += std::fabs(term);
    }
};

// What the pieces found, (pieces, lines), over all of them.
void check_lines_sum(const Line& pieces, const Sum* want, int64_t lines, double rounding,
                     const std::string& what) {
    std::vector<double> found(lines);
    for (size_t k = 0; k < pieces.size(); ++k) found[k % lines] += pieces[k];
    for (int64_t line = 0; line < lines; ++line)
        near(found[line], want[line].sum, rounding * want[line].size + 1e-30, what);
}

// Some lines have no weight.
void check_gradient(const Problem& p, bool both, Type type, float loss_scale = 1.0f) {
    Line row_lse, row_weight, column_lse, column_weight;
    for (int64_t i = 0; i < p.rows; ++i) {
        row_lse.push_back(float(lse_of(p, i, true)));
        row_weight.push_back(i % 10 == 3 ? 0.0f : loss_scale * (0.5f + 0.01f * float(i % 10)));
    }
    for (int64_t j = 0; j < p.columns; ++j) {
        column_lse.push_back(float(lse_of(p, j, false)));
        column_weight.push_back(j % 10 == 5 ? 0.0f : loss_scale * (0.2f - 0.03f * float(j % 10)));
    }
    Memory room(0, 0, 1, Type::F32), other(p.rows, p.columns, p.columns + 3, type);
    const cuda::Tile tile = p.tile(room);
    // float32 in place
    Memory& out = type == Type::F32 ? room : other;
    Line sums(2 * tile.pieces_across() * tile.pieces_down() * cuda::WARPS);
    const Lines columns{column_lse.data(), column_weight.data()};
    Line row_sum(tile.pieces_across() * p.rows), column_sum(tile.pieces_down() * p.columns);
    const Biases biases = p.biases(row_sum.data(), column_sum.data());
    cuda::gradient(tile, {row_lse.data(), row_weight.data()}, both ? columns : Lines{},
                   out.matrix(), sums.data(), p.row_bias.empty() ? nullptr : &biases, nullptr);
    out.check_margin("G");
    double dot = 0, total = 0, size = 1e-9 * loss_scale;
    std::vector<Sum> by_row(p.rows), by_column(p.columns);
    for (int64_t i = 0; i < p.rows; ++i) {
        for (int64_t j = 0; j < p.columns; ++j) {
            double want = 0, terms = 0;
            const double of_row = p.logit(i, j, true), of_column = p.logit(i, j, false);
            if (!p.left_out(i, j)) {
                if (of_row > -INF) terms = want = row_weight[i] * std::exp(of_row - row_lse[i]);
                by_column[j].add(want);
                double other = 0;
                if (of_column > -INF) other = column_weight[j] * std::exp(of_column - column_lse[j]);
                if (both) want += other, by_row[i].add(other);
                if (both) terms += std::fabs(other);
            }
            dot += want * p.cosine(i, j);
            total += want;
            size += terms * (1 + std::fabs(p.cosine(i, j)));
            // an exponential is flushed to 0 below 2^-46 of its line's sum, or far lower
            const double flushed = 0x1p-46 * (row_weight[i] + both * std::fabs(column_weight[j]));
            const double rounding = 2 * terms * p.rounding() + std::fabs(want) * out.rounding();
            near(out.at(i, j), p.scale * want,
                 std::fabs(p.scale) * (rounding + flushed + 0x1p-126) + 1e-25 * loss_scale, "G");
        }
    }
    check_sums(sums, dot, total, size, 2 * p.rounding());
    if (p.row_bias.empty()) return;
    check_lines_sum(row_sum, by_row.data(), p.rows, 2 * p.rounding(), "gradient by a row's bias");
    check_lines_sum(column_sum, by_column.data(), p.columns, 2 * p.rounding(),
                    "gradient by a column's bias");
}

// Entries whose ids agree are left out or, with `positive_ids`, have -S and -G.
void check_sigmoid(const Problem& p, Type type, bool positive_ids = false) {
    Line weight;
    for (int64_t i = 0; i < p.rows; ++i) weight.push_back(0.5f + 0.1f * float(i % 7));
    Memory room(0, 0, 1, Type::F32), other(p.rows, p.columns, p.columns + 1, type), spare = room;
    const cuda::Tile tile = p.tile(room);
    Memory& out = type == Type::F32 ? room : other;
    const int64_t across = tile.pieces_across();
    Line rows(across * p.rows), again(across * p.rows);
    Line sums(2 * across * tile.pieces_down() * cuda::WARPS);
    cuda::sigmoid(tile, weight.data(), rows.data(), out.matrix(), sums.data(), positive_ids,
                  nullptr);
    out.check_margin("G of the sigmoid");
    cuda::sigmoid(p.tile(spare), weight.data(), again.data(), {}, nullptr, positive_ids, nullptr);
    expect(rows == again, "other row sums without a gradient");
    double dot = 0, total = 0, size = 1e-9;
    for (int64_t i = 0; i < p.rows; ++i) {
        double softplus = 0, found = 0;
        for (int64_t a = 0; a < across; ++a) found += rows[a * p.rows + i];
        for (int64_t j = 0; j < p.columns; ++j) {
            const bool same = p.same_id(i, j);
            const double sign = positive_ids && same ? -1 : 1, z = sign * p.logit(i, j);
            const bool kept = j != i + p.diagonal && (positive_ids || !same);
            if (kept) softplus += std::fmax(z, 0) + std::log1p(std::exp(-std::fabs(z)));
            const double want = kept ? sign * weight[i] / (1 + std::exp(-z)) : 0;
            near(out.at(i, j), p.scale * want,
                 std::fabs(p.scale * want) * (p.rounding() + out.rounding()) + 1e-30, "G");
            dot += want * p.cosine(i, j);
            total += want;
            size += std::fabs(want);
        }
        near(found, softplus, p.rounding() * (softplus + 1e-3), "softplus");
    }
    check_sums(sums, dot, total, size, 2 * p.rounding());
}

// Which lines have the call's anchor and which a maximum of their own; both serve.
void check_anchors() {
    Problem p(70, 140, 140, 100.0f);
    for (float& entry : p.data) entry = std::fmin(std::fabs(entry), 1.0f);
    const auto count_own = [](const Statistics& lines, float anchor) {
        return std::count_if(lines.max.begin(), lines.max.end(),
                             [=](float max) { return max != anchor; });
    };
    const auto check = [&](const Problem& problem, float anchor, int rows, int columns,
                           const std::string& what) {
        const Found found = statistics_of({problem}, true, false);
        check_lines(problem, found.rows, true, 1, false, what);
        check_lines(problem, found.columns, false, 1, false, what);
        expect(count_own(found.rows, anchor) == rows, what + ": rows by their maxima");
        expect(count_own(found.columns, anchor) == columns, what + ": columns by their maxima");
        for (Type type : {Type::F32, Type::BF16}) check_gradient(problem, true, type);
    };
    check(p, 31.0f, 0, 0, "plain");
    check(p.with_offset(-300.0f), -269.0f, 0, 0, "offset");
    for (float loss_scale : {0x1p-100f, 0x1p24f}) check_gradient(p, true, Type::F32, loss_scale);
    // all of row 3, all of column 5: to sums that have lost digits, and to nothing
    for (float top : {-0.55f, -0.7f})
        for (bool row : {true, false}) {
            Problem vanishing = p;
            for (int64_t k = 0; k < (row ? p.columns : p.rows); ++k) {
                float& entry = vanishing.data[row ? 3 * p.stride + k : k * p.stride + 5];
                entry = top - 0.1f * entry;
            }
            const Found found = statistics_of({vanishing}, true, false);
            const Statistics& lines = row ? found.rows : found.columns;
            expect(lines.max[row ? 3 : 5] < 0.0f && lines.max.back() == 31.0f, "a vanishing line");
            check_lines(vanishing, found.rows, true, 1, false, "vanishing row");
            check_lines(vanishing, found.columns, false, 1, false, "vanishing column");
            for (Type type : {Type::F32, Type::BF16}) check_gradient(vanishing, true, type);
        }
    Problem outlier = p;
    outlier.data[3 * p.stride + 5] = 30.0f;
    check_statistics(outlier);
    for (Type type : {Type::F32, Type::BF16}) check_gradient(outlier, true, type);
    check_statistics(p.with_ids(1, 1, false));
}

// One line at a time is NaN, and only the lines that meet it.
void check_nan() {
    Problem p(70, 140, 140, 14.0f);
    p.data[3 * p.stride + 5] = NAN;
    const Found found = statistics_of({p}, true, false);
    for (int64_t i = 0; i < p.rows; ++i)
        expect(std::isnan(found.rows.sum[i]) == (i == 3) &&
                   std::isnan(found.rows.max[i]) == (i == 3),
               "NaN in a row");
    for (int64_t j = 0; j < p.columns; ++j)
        expect(std::isnan(found.columns.sum[j]) == (j == 5), "NaN in a column");
    const Line lse(p.columns, 1.0f), weight(p.columns, 1.0f);
    for (bool spoilt_line : {false, true}) {
        Line row_lse(p.rows, 1.0f);
        if (spoilt_line) row_lse[3] = NAN;
        Memory room(0, 0, 1, Type::F32);
        const cuda::Tile tile = p.tile(room);
        cuda::gradient(tile, {row_lse.data(), weight.data()}, {lse.data(), weight.data()},
                       room.matrix(), nullptr, nullptr, nullptr);
        for (int64_t j = 0; j < p.columns; ++j) {
            expect(std::isnan(room.at(3, j)) == (spoilt_line || j == 5), "NaN in a gradient");
            expect(!std::isnan(room.at(4, j)), "NaN in another row's gradient");
        }
    }
}

void check_finish(int64_t rows, int64_t width, int64_t stride, Type partner_type, Type out_type) {
    Memory total(rows, width, stride, Type::F32), partner(rows, width, stride, partner_type);
    // aligned as the others are, or not
    Memory out(rows, width, stride + (rows % 2 ? 4 : 1), out_type);
    Memory other(rows, width, stride, out_type);
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    Line coefficient(rows), dots(rows);
    for (int64_t i = 0; i < rows; ++i) {
        coefficient[i] = normal(random);
        for (int64_t d = 0; d < width; ++d) {
            total.set(i, d, normal(random));
            partner.set(i, d, normal(random));
            other.set(i, d, normal(random));
        }
    }
    cuda::finish(rows, width, total.matrix(), coefficient.data(), partner.matrix(), out.matrix(),
                 nullptr);
    cuda::row_dot(rows, width, partner.matrix(), other.matrix(), dots.data(), nullptr);
    out.check_margin("finish");
    for (int64_t i = 0; i < rows; ++i) {
        double dot = 0, size = 0;
        for (int64_t d = 0; d < width; ++d) {
            const double term = double{coefficient[i]} * partner.at(i, d);
            const double want = total.at(i, d) + term;
            near(out.at(i, d), want,
                 std::fabs(want) * out.rounding() * 1.01 + 2e-7 * std::fabs(term) + 4e-8, "finish");
            dot += double{partner.at(i, d)} * other.at(i, d);
            size += std::fabs(double{partner.at(i, d)} * other.at(i, d));
        }
        near(dots[i], dot, 1e-6 * size, "row_dot");
    }
    const Line before = total.wide;
    cuda::finish(rows, width, total.matrix(), coefficient.data(), partner.matrix(),
                 total.matrix(), nullptr);
    if (out_type == Type::F32)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t d = 0; d < width; ++d)
                expect(total.at(i, d) == out.at(i, d), "finish in place");
}

void check_repeats() {
    const Problem p = Problem(200, 300, 301, 30.0f).with_diagonal(3);
    const Found first = statistics_of({p, p}, true, false);
    for (int repeat = 0; repeat < 3; ++repeat) {
        const Found again = statistics_of({p, p}, true, false);
        expect(again.rows.max == first.rows.max && again.rows.sum == first.rows.sum &&
                   again.columns.max == first.columns.max && again.columns.sum == first.columns.sum,
               "other bits in a repeat");
    }
}

// What the emulation itself rounds: every bf16 and fp16 that is a number comes back.
void check_types() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        __half half;
        half.bits = uint16_t(bits);
        const float wide = static_cast<float>(half);
        expect(std::isnan(wide) || __half(wide).bits == bits, "fp16 there and back");
        __nv_bfloat16 brain;
        brain.bits = uint16_t(bits);
        const float other = static_cast<float>(brain);
        expect(std::isnan(other) || __nv_bfloat16(other).bits == bits, "bf16 there and back");
    }
    // ties to even, and to the neighbor
    expect(__half(1.0f + 0x1p-11f).bits == 0x3c00, "fp16");
    expect(__half(1.0f + 0x1.8p-10f).bits == 0x3c02, "fp16");
    expect(__nv_bfloat16(1.0f + 0x1p-8f).bits == 0x3f80, "bf16");
    expect(__nv_bfloat16(1.0f + 0x1.8p-7f).bits == 0x3f82, "bf16");
    expect(__half(65519.0f).bits == 0x7bff && __half(65520.0f).bits == 0x7c00, "fp16's largest");
}

}  // namespace

int main() {
    check_types();
    struct Size {
        int64_t rows, columns, padding;
    };
    for (float scale : {1e-4f, 1e4f, -100.0f})
        for (float offset : {-300.0f, 300.0f}) {
            const Problem p = Problem(70, 132, 136, scale).with_diagonal(2);
            check_statistics(p.with_offset(offset));
            check_gradient(p.with_offset(offset), true, Type::BF16);
        }
    // one entry; odd lines, misaligned and aligned; whole pieces; more than one each way; more
    // than warps that merge them
    for (const Size size : {Size{1, 1, 0}, {1, 130, 2}, {9, 3, 1}, {65, 67, 1}, {64, 128, 0},
                            {70, 132, 4}, {130, 257, 3}, {2, 1100, 0}, {530, 3, 1}}) {
        const int64_t stride = size.columns + size.padding;
        const float scales[] = {14.3f, 0.1f, 100.0f, -20.0f, 1000.0f};
        for (size_t turn = 0; turn < std::size(scales); ++turn) {
            const float scale = scales[turn];
            const Problem p(size.rows, size.columns, stride, scale);
            const Problem cases[] = {
                p,
                p.with_diagonal(0),
                p.with_diagonal(size.columns / 2 - 40),
                p.with_diagonal(-5).with_ids(7, 11, false),
                p.with_ids(3, 2, true),
                p.with_ids(1, 1, false),
                p.with_diagonal(1).with_offset(-10.0f),
                p.with_biases().with_diagonal(3),
                p.with_biases().with_ids(7, 11, false).with_offset(2.0f),
            };
            for (size_t which = 0; which < std::size(cases); ++which) {
                // the first scale with all, the others with a third; types of G in turn
                if (turn && (which + turn) % 3) continue;
                const bool odd = (which + turn) / 3 % 2;
                const Problem& each = cases[which];
                check_statistics(each);
                check_gradient(each, true, odd ? Type::F32 : Type::BF16);
                check_gradient(each, false, odd ? Type::BF16 : Type::F32);
                // the losses that have these have no biases
                if (!each.row_bias.empty()) continue;
                if (!each.has_offset) check_rows(each, odd ? Type::F32 : Type::BF16);
                check_sigmoid(each, odd ? Type::F32 : Type::BF16);
                if (!each.row_id.empty())
                    check_sigmoid(each, odd ? Type::BF16 : Type::F32, true);
            }
        }
    }
    for (Type partner : {Type::F32, Type::BF16, Type::F16})
        for (Type out : {Type::F32, Type::BF16, Type::F16})
            for (const Size s : {Size{1, 1, 0}, {9, 77, 0}, {17, 128, 0}, {8, 132, 4}, {3, 66, 2}})
                check_finish(s.rows, s.columns, s.columns + s.padding, partner, out);
    check_anchors();
    check_far_tiles();
    check_nan();
    check_repeats();
    return expected::status();
}
