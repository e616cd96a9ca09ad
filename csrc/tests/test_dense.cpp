// Losses over a whole S against their definitions in double: values, and gradients by differences
// of the definitions. The products are made by a plain sgemm of this file.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "fastclip/dense.h"
#include "fastclip/product.h"
#include "tests/expect.h"

using namespace fastclip;
using expected::expect;

namespace {

using Line = std::vector<double>;
constexpr int64_t WIDTH = 5;

void plain_sgemm(const char* a_way, const char* b_way, const int64_t* m, const int64_t* n,
                 const int64_t* k, const float*, const float* a, const int64_t* lda,
                 const float* b, const int64_t* ldb, const float*, float* c, const int64_t* ldc) {
    for (int64_t i = 0; i < *m; ++i)
        for (int64_t j = 0; j < *n; ++j) {
            float sum = 0;
            for (int64_t l = 0; l < *k; ++l)
                sum += (*a_way == 'N' ? a[i + l * *lda] : a[l + i * *lda]) *
                       (*b_way == 'N' ? b[l + j * *ldb] : b[j + l * *ldb]);
            c[i + j * *ldc] = sum;
        }
}

void wrong_sgemm(const char*, const char*, const int64_t*, const int64_t*, const int64_t*,
                 const float*, const float*, const int64_t*, const float*, const int64_t*,
                 const float*, float*, const int64_t*) {}

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// Features of X and, unless S is symmetric, of Y behind them; then the scale, then the offset.
struct Values {
    int64_t rows, columns;
    bool symmetric;
    Line data;

    int64_t features() const { return (rows + (symmetric ? 0 : columns)) * WIDTH; }
    double scale() const { return data[features()]; }
    double offset() const { return data[features() + 1]; }
    double S(int64_t i, int64_t j) const {
        const double* const x = &data[i * WIDTH];
        const double* const y = &data[((symmetric ? 0 : rows) + j) * WIDTH];
        double sum = 0;
        for (int64_t l = 0; l < WIDTH; ++l) sum += x[l] * y[l];
        return scale() * sum + offset();
    }
    // log-sum-exp over the pairs that are left, of a row or of a column
    double lse(int64_t line, bool column, const std::function<bool(int64_t, int64_t)>& left) const {
        double sum = 0;
        for (int64_t k = 0; k < (column ? rows : columns); ++k) {
            const int64_t i = column ? k : line, j = column ? line : k;
            if (left(i, j)) sum += std::exp(S(i, j));
        }
        return std::log(sum);
    }
};

Values random_values(int64_t rows, int64_t columns, bool symmetric, double offset) {
    Values made{rows, columns, symmetric, {}};
    made.data.resize(made.features() + 2);
    std::mt19937 random(static_cast<unsigned>(rows * 100 + columns));
    std::normal_distribution<double> normal(0.0, 0.4);
    for (double& value : made.data) value = static_cast<float>(normal(random));
    made.data[made.features()] = 3.0;
    made.data[made.features() + 1] = offset;
    return made;
}

using Loss = std::function<double(const Values&)>;

void compare(const char* name, const Dense& dense, const Values& values, const Loss& loss,
             int threads) {
    std::vector<float> features(values.data.begin(), values.data.end());
    std::vector<float> room(dense.room(), NAN);
    const float* const y = features.data() + (values.symmetric ? 0 : values.rows * WIDTH);
    const Features given{features.data(), y, WIDTH, false};
    float value = NAN, accuracy[2] = {}, d_scale = NAN, d_offset = NAN;
    dense.forward(room.data(), given, &value, accuracy, Reduction::MEAN, threads);
    expect(std::fabs(value - loss(values)) < 1e-5 * (1 + std::fabs(value)), name);
    const float upstream = 2.0f;
    std::vector<float> found(values.features(), NAN);
    const Gradients wanted{found.data(),
                           values.symmetric ? nullptr : found.data() + values.rows * WIDTH,
                           values.symmetric ? 0 : values.columns, &d_scale, &d_offset};
    dense.backward(room.data(), given, {&upstream, Reduction::MEAN}, wanted, threads);
    found.push_back(d_scale);
    if (values.offset() != 0) found.push_back(d_offset);
    for (size_t k = 0; k < found.size(); ++k) {
        Values moved = values;
        const double step = 1e-5;
        moved.data[k] += step;
        const double above = loss(moved);
        moved.data[k] -= 2 * step;
        const double slope = 2.0 * (above - loss(moved)) / (2 * step);
        expect(std::fabs(found[k] - slope) < 1e-4 * (1 + std::fabs(slope)), name);
    }
}

void pairs(int64_t n, int64_t m, double smoothing, bool grouped, int threads) {
    std::vector<int32_t> row_id, column_id;
    for (int64_t i = 0; i < n; ++i) row_id.push_back(static_cast<int32_t>(i % 5));
    for (int64_t j = 0; j < m; ++j) column_id.push_back(static_cast<int32_t>(j % 7));
    const auto left = [&](int64_t i, int64_t j) {
        return i != j && !(grouped && row_id[i] == column_id[j]);
    };
    const auto mean = [&](const Values& v, int64_t line, bool column) {
        double sum = 0, count = 0;
        for (int64_t k = 0; k < (column ? n : m); ++k) {
            const int64_t i = column ? k : line, j = column ? line : k;
            if (!left(i, j) && i != j) continue;
            sum += v.S(i, j);
            count += 1;
        }
        return sum / count;
    };
    const Loss loss = [&](const Values& v) {
        double total = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double p = v.S(i, i);
            for (const bool column : {false, true})
                total += softplus(v.lse(i, column, left) - p) +
                         (smoothing > 0 ? smoothing * (p - mean(v, i, column)) : 0.0);
        }
        return total / static_cast<double>(2 * n);
    };
    PairsOptions options{n, m, 3.0f, true, 0, smoothing, nullptr, {}, {}};
    if (grouped) options.row_id = {row_id.data(), 4}, options.column_id = {column_id.data(), 4};
    compare("pairs", *dense_pairs(options), random_values(n, m, false, 0.0), loss, threads);
}

void indexed(int64_t n, int64_t m, int64_t first, int threads) {
    std::vector<int64_t> positive;
    for (int64_t i = 0; i < n; ++i) positive.push_back(i * 2 % m);
    const Loss loss = [&](const Values& v) {
        double total = 0;
        for (int64_t i = 0; i < n; ++i) {
            const auto left = [&](int64_t, int64_t j) { return j != positive[i] && j >= first; };
            total += softplus(v.lse(i, false, left) - v.S(i, positive[i]));
        }
        return total / static_cast<double>(n);
    };
    const PairsOptions options{n, m, 3.0f, false, first, 0.0, positive.data(), {}, {}};
    compare("indexed", *dense_pairs(options), random_values(n, m, false, 0.0), loss, threads);
}

void sigmoids(int64_t n, int threads) {
    const Loss loss = [&](const Values& v) {
        double total = 0;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) total += softplus(i == j ? -v.S(i, j) : v.S(i, j));
        return total / static_cast<double>(n);
    };
    compare("sigmoid", *dense_sigmoid(n, 3.0f, -1.5f), random_values(n, n, false, -1.5), loss,
            threads);
}

void blocks(int64_t n, int threads) {
    const int64_t count = 3, m = n * count;
    const Loss loss = [&](const Values& v) {
        double total = 0;
        const auto left = [&](int64_t i, int64_t j) { return i % n != j % n; };
        for (int64_t i = 0; i < m; ++i)
            for (int64_t p = i % n; p < m; p += n)
                if (p != i) total += 0.5 * softplus(v.lse(i, false, left) - v.S(i, p)) / 2;
        return total / static_cast<double>(m);
    };
    // tables that hold one number in all entries, read by pair; gradients are summed up
    const Table scale{{3.0f}, 0}, offset{{-1.5f}, 0}, weight{{0.5f, 0.5f, NAN, 0.5f}, 2};
    compare("blocks", *dense_blocks({n, {0, 0, 1}, scale, offset, weight}),
            random_values(m, m, true, -1.5), loss, threads);
}

void labels(int64_t n, int threads) {
    std::vector<int64_t> label;
    for (int64_t i = 0; i < n; ++i) label.push_back(i == 0 ? -9 : i % 4);
    const Loss loss = [&](const Values& v) {
        double total = 0, anchors = 0;
        const auto left = [](int64_t i, int64_t j) { return i != j; };
        for (int64_t i = 0; i < n; ++i) {
            double sum = 0, others = 0;
            for (int64_t j = 0; j < n; ++j)
                if (j != i && label[j] == label[i]) sum += v.S(i, j), others += 1;
            if (others == 0) continue;
            total += v.lse(i, false, left) - sum / others;
            anchors += 1;
        }
        return total / anchors;
    };
    compare("labels", *dense_labels(n, 3.0f, {label.data(), 8}), random_values(n, n, true, 0.0),
            loss, threads);
}

}  // namespace

int main() {
    expect(!use_blas(nullptr), "no BLAS");
    expect(!use_blas(reinterpret_cast<void*>(&wrong_sgemm)), "a wrong BLAS");
    expect(use_blas(reinterpret_cast<void*>(&plain_sgemm)), "a right BLAS");
    for (const int threads : {1, 3}) {
        for (const bool grouped : {false, true})
            for (const double smoothing : {0.0, 0.1}) {
                pairs(19, 19, smoothing, grouped, threads);
                pairs(17, 22, smoothing, grouped, threads);
            }
        indexed(9, 21, 0, threads);
        indexed(9, 21, 6, threads);
        sigmoids(18, threads);
        blocks(6, threads);
        labels(21, threads);
    }
    return expected::status();
}
