// What surrounds the epilogues where S is whole: positives, what is left out, losses and weights.
// These are lines of n numbers, in double; the sweeps over the table are the epilogues'.
#include "fastclip/dense.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fastclip/epilogues.h"
#include "fastclip/product.h"
#include "parts.h"
#include "pool.h"

namespace fastclip {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

double sigmoid_of(double x) {
    const double e = std::exp(-std::fabs(x));
    return (x < 0 ? e : 1.0) / (1.0 + e);
}

// A scale that sums of G * S can be divided by: S of the least one lies far below a rounding of
// any sum that it enters (as `away_from_zero` in Python).
float away_from_zero(float scale) {
    static const float least = std::pow(std::numeric_limits<float>::min(), 0.25f);
    return std::fabs(scale) < least ? least : scale;
}

// The cosine whose logit is -inf.
float left_out(float scale) { return -INFINITE / scale; }

// Room of this thread's own; it only grows.
float* scratch(size_t count) {
    static thread_local std::vector<float> room;
    if (room.size() < count) room.resize(count);
    return room.data();
}

// body(i) for rows [0, rows) of a table, by several threads.
template <class Body>
void for_rows(int64_t rows, int64_t columns, int threads, Body&& body) {
    const Parts parts(rows, columns, threads);
    run(parts.count, [&](int part) {
        for (int64_t i = parts.begin(part); i < parts.end(part); ++i) body(i);
    });
}

// body(data) with the ids in their own type.
template <class Body>
void with_type(Ids ids, Body&& body) {
    if (ids.bytes == 4) body(static_cast<const int32_t*>(ids.data));
    if (ids.bytes == 8) body(static_cast<const int64_t*>(ids.data));
}

// Neighbors in float32 are 2 apart there: exp(S - lse) has no correct digit.
constexpr float LARGEST_LOGIT = 16777216.0f;

// Maxima and sums to log-sum-exps, which replace the sums; NaN of logits that are too large.
void finish(int64_t n, const float* max, float* sum) {
    for (int64_t i = 0; i < n; ++i) {
        if (sum[i] == 0)
            sum[i] = -INFINITE;
        else if (std::fabs(max[i]) > LARGEST_LOGIT)
            sum[i] = std::numeric_limits<float>::quiet_NaN();
        else
            sum[i] = static_cast<float>(max[i] + std::log(static_cast<double>(sum[i])));
    }
}

void begin(int64_t n, Running running) {
    std::fill_n(running.max, n, -INFINITE);
    std::fill_n(running.sum, n, 0.0f);
}

void reduce(const double* losses, int64_t n, double divisor, Reduction reduction, float* out) {
    if (reduction == Reduction::NONE) {
        std::copy_n(losses, n, out);
        return;
    }
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += losses[i];
    *out = static_cast<float>(reduction == Reduction::MEAN ? total / divisor : total);
}

Matrix matrix(Operand operand) {
    return operand.transposed ? Matrix{operand.data, 1, operand.stride}
                              : Matrix{operand.data, operand.stride, 1};
}

// The gradient of each anchor.
class Weights {
public:
    Weights(Upstream upstream, double divisor)
        : values_(upstream.values), stride_(upstream.reduction == Reduction::NONE),
          factor_(upstream.reduction == Reduction::MEAN ? 1 / divisor : 1.0) {}
    double operator[](int64_t i) const { return values_[i * stride_] * factor_; }

private:
    const float* values_;
    int64_t stride_;
    double factor_;
};

class Pairs : public Dense {
public:
    explicit Pairs(const PairsOptions& options)
        // log-sum-exps of rows and columns, cosines of positives; smoothing: means, counts of both
        : Dense(options.rows, options.columns, options.rows * (options.smoothing > 0 ? 7 : 3)),
          o_(options), scale_(away_from_zero(options.scale)) {}

protected:
    void losses(float* S, float* kept, float* loss, float* accuracy, Reduction reduction,
                 int threads) const override {
        const Running rows{scratch(2 * n_), kept}, columns{rows.max + n_, kept + n_};
        float* const positive = kept + 2 * n_;
        for (int64_t i = 0; i < n_; ++i) positive[i] = S[i * m_ + at(i)];
        if (o_.smoothing > 0) form_means(S, kept);
        leave_out(S, threads);
        begin(n_, rows);
        if (o_.both) begin(n_, columns);
        const int64_t first = o_.first_negative, paired = o_.both ? n_ : m_;
        if (first < paired)
            fastclip::statistics(tile(S, first, paired), rows, o_.both ? &columns : nullptr, threads);
        if (paired < m_) fastclip::statistics(tile(S, paired, m_), rows, nullptr, threads);
        finish(n_, rows.max, rows.sum);
        if (o_.both) finish(n_, columns.max, columns.sum);
        if (accuracy) {
            accuracy[0] = above(positive, rows.max);
            if (o_.both) accuracy[1] = above(positive, columns.max);
        }
        std::vector<double> losses(n_);
        for (int64_t i = 0; i < n_; ++i) {
            const double p = logit(positive[i]);
            losses[i] = softplus(rows.sum[i] - p);
            if (o_.both) losses[i] = (losses[i] + softplus(columns.sum[i] - p)) / 2;
            if (o_.smoothing > 0) {
                const double mean = (kept[3 * n_ + i] + static_cast<double>(kept[4 * n_ + i])) / 2;
                losses[i] += o_.smoothing * scale_ * (positive[i] - mean);
            }
        }
        reduce(losses.data(), n_, static_cast<double>(n_), reduction, loss);
    }

    void gradient(float* S, const float* kept, Upstream upstream, float* d_scale, float*,
                  int threads) const override {
        const Weights weight(upstream, static_cast<double>(n_));
        float* const a = scratch(2 * n_);
        float* const b = a + n_;
        const float* const positive = kept + 2 * n_;
        for (int64_t i = 0; i < n_; ++i) {
            const double p = logit(positive[i]), w = o_.both ? weight[i] / 2 : weight[i];
            a[i] = static_cast<float>(w * sigmoid_of(kept[i] - p));
            b[i] = o_.both ? static_cast<float>(w * sigmoid_of(kept[n_ + i] - p)) : 0.0f;
        }
        const Lines rows{kept, a}, columns{kept + n_, b};
        Sums sums;
        Sums* const wanted = d_scale ? &sums : nullptr;
        const int64_t first = o_.first_negative, paired = o_.both ? n_ : m_;
        if (first < paired)
            fastclip::gradient(tile(S, first, paired), rows, o_.both ? &columns : nullptr, wanted, threads);
        if (paired < m_) fastclip::gradient(tile(S, paired, m_), rows, nullptr, wanted, threads);
        for (int64_t i = 0; i < n_ && first > 0; ++i) std::fill_n(S + i * m_, first, 0.0f);
        for (int64_t i = 0; i < n_; ++i) {
            const double q = -static_cast<double>(a[i]) - b[i];
            S[i * m_ + at(i)] = static_cast<float>(q * scale_);
            sums.dot += q * positive[i];
        }
        if (o_.smoothing > 0) smooth(S, kept, weight, a, b, &sums, threads);
        if (d_scale) *d_scale = static_cast<float>(sums.dot);
    }

private:
    int64_t at(int64_t i) const { return o_.positive ? o_.positive[i] : i; }
    double logit(float cosine) const { return static_cast<double>(cosine) * scale_; }

    Tile tile(float* S, int64_t begin, int64_t end) const {
        return {S + begin, n_, end - begin, m_, scale_, 0.0f};
    }

    // body(i, j) for what ids leave out of row i, the positive too where it has the row's id
    template <class Body>
    void same_ids(int64_t i, Body&& body) const {
        if (!o_.row_id.data) return;
        with_type(o_.row_id, [&](auto* row_id) {
            const auto* const id = static_cast<decltype(row_id)>(o_.column_id.data);
            const auto own = row_id[i];
            for (int64_t j = 0; j < m_; ++j)
                if (id[j] == own) body(j);
        });
    }

    void leave_out(float* S, int threads) const {
        const float value = left_out(scale_);
        for_rows(n_, o_.row_id.data ? m_ : 1, threads, [&](int64_t i) {
            float* const row = S + i * m_;
            same_ids(i, [&](int64_t j) { row[j] = value; });
            row[at(i)] = value;
        });
    }

    float above(const float* positive, const float* top) const {
        int64_t hits = 0;
        for (int64_t i = 0; i < n_; ++i) hits += static_cast<float>(logit(positive[i])) > top[i];
        return static_cast<float>(hits) / static_cast<float>(n_);
    }

    // Mean cosines of each row's and column's candidates, and their number.
    void form_means(const float* S, float* kept) const {
        std::vector<double> total(2 * n_), count(2 * n_);
        for (int64_t i = 0; i < n_; ++i) {
            const float* const row = S + i * m_;
            double sum = 0;
            for (int64_t j = 0; j < m_; ++j) sum += row[j];
            for (int64_t j = 0; j < n_; ++j) total[n_ + j] += row[j];
            count[i] += static_cast<double>(m_);
            count[n_ + i] += static_cast<double>(n_);
            same_ids(i, [&](int64_t j) {
                if (j == i) return;
                sum -= row[j];
                count[i] -= 1;
                if (j < n_) {
                    total[n_ + j] -= row[j];
                    count[n_ + j] -= 1;
                }
            });
            total[i] = sum;
        }
        for (int64_t k = 0; k < 2 * n_; ++k) {
            kept[3 * n_ + k] = static_cast<float>(total[k] / count[k]);
            kept[5 * n_ + k] = static_cast<float>(count[k]);
        }
    }

    void smooth(float* S, const float* kept, const Weights& weight, float* row, float* column,
                Sums* sums, int threads) const {
        const float *const means = kept + 3 * n_, *const counts = kept + 5 * n_;
        for (int64_t i = 0; i < n_; ++i) {
            const double w = weight[i] * o_.smoothing;
            row[i] = static_cast<float>(w / 2 / counts[i] * scale_);
            column[i] = static_cast<float>(w / 2 / counts[n_ + i] * scale_);
            S[i * m_ + i] += static_cast<float>(w * scale_);
            sums->dot += w * (kept[2 * n_ + i] - (static_cast<double>(means[i]) + means[n_ + i]) / 2);
        }
        for_rows(n_, m_, threads, [&](int64_t i) {
            float* const line = S + i * m_;
            for (int64_t j = 0; j < n_; ++j) line[j] -= row[i] + column[j];
            for (int64_t j = n_; j < m_; ++j) line[j] -= row[i];
            // these have no gradient
            same_ids(i, [&](int64_t j) {
                if (j != i) line[j] = 0.0f;
            });
        });
    }

    const PairsOptions o_;
    const float scale_;
};

class Sigmoid : public Dense {
public:
    Sigmoid(int64_t rows, float scale, float offset)
        // cosines of positives
        : Dense(rows, rows, rows), scale_(away_from_zero(scale)), offset_(offset) {}

protected:
    void losses(float* S, float* positive, float* loss, float*, Reduction reduction,
                 int threads) const override {
        for (int64_t i = 0; i < n_; ++i) {
            positive[i] = S[i * (n_ + 1)];
            S[i * (n_ + 1)] = left_out(scale_);
        }
        float* const sums = scratch(n_);
        std::fill_n(sums, n_, 0.0f);
        fastclip::sigmoid(tile(S), nullptr, sums, nullptr, threads);
        std::vector<double> losses(n_);
        for (int64_t i = 0; i < n_; ++i) losses[i] = sums[i] + softplus(-logit(positive[i]));
        reduce(losses.data(), n_, static_cast<double>(n_), reduction, loss);
    }

    void gradient(float* S, const float* positive, Upstream upstream, float* d_scale,
                  float* d_offset, int threads) const override {
        const Weights weight(upstream, static_cast<double>(n_));
        float* const weights = scratch(2 * n_);
        for (int64_t i = 0; i < n_; ++i) weights[i] = static_cast<float>(weight[i]);
        Sums sums;
        fastclip::sigmoid(tile(S), weights, weights + n_, &sums, threads);
        for (int64_t i = 0; i < n_; ++i) {
            const double q = -weight[i] * sigmoid_of(-logit(positive[i]));
            S[i * (n_ + 1)] = static_cast<float>(q * scale_);
            sums.dot += q * positive[i];
            sums.total += q;
        }
        if (d_scale) *d_scale = static_cast<float>(sums.dot);
        if (d_offset) *d_offset = static_cast<float>(sums.total);
    }

private:
    double logit(float cosine) const { return static_cast<double>(cosine) * scale_ + offset_; }
    Tile tile(float* S) const { return {S, n_, n_, n_, scale_, offset_}; }

    const float scale_, offset_;
};

int64_t rows_of(const BlocksOptions& options) {
    return options.pairs * static_cast<int64_t>(options.domains.size());
}

class Blocks : public Dense {
public:
    explicit Blocks(const BlocksOptions& options)
        // log-sum-exps, and cosines of positives, (block, other block, pair)
        : Dense(rows_of(options), rows_of(options),
                rows_of(options) * (1 + static_cast<int64_t>(options.domains.size()))),
          o_(options), count_(static_cast<int64_t>(options.domains.size())), pairs_(o_.pairs) {
        for (float& entry : o_.scale.entries) entry = away_from_zero(entry);
        // neighbors of one domain are one tile, or with one number for all, all of them
        const bool one = o_.scale.width == 0 && o_.offset.width == 0;
        for (int64_t block = 0; block < count_; ++block)
            if (block == 0 || (!one && o_.domains[block] != o_.domains[block - 1]))
                starts_.push_back(block);
        starts_.push_back(count_);
    }

protected:
    void losses(float* S, float* lse, float* loss, float* accuracy, Reduction reduction,
                 int threads) const override {
        float* const positive = lse + m_;
        for (int64_t b = 0; b < count_; ++b)
            for (int64_t c = 0; c < count_; ++c) {
                const float value = left_out(scale(b, c));
                for (int64_t k = 0; k < pairs_; ++k) {
                    float& entry = S[(b * pairs_ + k) * m_ + c * pairs_ + k];
                    positive[(b * count_ + c) * pairs_ + k] = entry;
                    entry = value;
                }
            }
        const Running rows{scratch(m_), lse};
        begin(m_, rows);
        for_tiles([&](int64_t b, int64_t c, int64_t row, const Tile& tile) {
            (void)b, (void)c;
            fastclip::statistics(tile, {rows.max + row, rows.sum + row}, nullptr, threads);
        }, S);
        finish(m_, rows.max, lse);
        std::vector<double> losses(m_);
        int64_t hits = 0;
        for_positives([&](int64_t i, int64_t b, int64_t c, float cosine) {
            const double p = logit(b, c, cosine);
            losses[i] += weight(b, c) * softplus(lse[i] - p);
            hits += static_cast<float>(p) > rows.max[i];
        }, positive);
        for (double& one : losses) one /= static_cast<double>(count_ - 1);
        if (accuracy) *accuracy = static_cast<float>(hits) / static_cast<float>(m_ * (count_ - 1));
        reduce(losses.data(), m_, static_cast<double>(m_), reduction, loss);
    }

    void gradient(float* S, const float* lse, Upstream upstream, float* d_scale, float* d_offset,
                  int threads) const override {
        const Weights upstream_of(upstream, static_cast<double>(m_));
        const float* const positive = lse + m_;
        std::vector<double> coefficient(count_ * m_), weight_of(m_);
        std::vector<double> scales(o_.scale.entries.size()), offsets(o_.offset.entries.size());
        for_positives([&](int64_t i, int64_t b, int64_t c, float cosine) {
            const double share = upstream_of[i] * weight(b, c) / static_cast<double>(count_ - 1);
            const double q = share * sigmoid_of(lse[i] - logit(b, c, cosine));
            weight_of[i] += q;
            coefficient[(b * count_ + c) * pairs_ + i % pairs_] = -q;
            scales[o_.scale.index(o_.domains[b], o_.domains[c])] -= q * cosine;
            offsets[o_.offset.index(o_.domains[b], o_.domains[c])] -= q;
        }, positive);
        float* const weights = scratch(m_);
        std::copy(weight_of.begin(), weight_of.end(), weights);
        for_tiles([&](int64_t b, int64_t c, int64_t row, const Tile& tile) {
            const int64_t column = c * pairs_;
            const Lines rows{lse + row, weights + row}, columns{lse + column, weights + column};
            Sums sums;
            fastclip::gradient(tile, rows, &columns, d_scale || d_offset ? &sums : nullptr, threads);
            // each pair of rows is here twice, and holds the gradients of both of its sides
            scales[o_.scale.index(o_.domains[b], o_.domains[c])] += sums.dot / 2;
            offsets[o_.offset.index(o_.domains[b], o_.domains[c])] += sums.total / 2;
        }, S);
        for (int64_t b = 0; b < count_; ++b)
            for (int64_t c = 0; c < count_; ++c)
                for (int64_t k = 0; k < pairs_; ++k)
                    S[(b * pairs_ + k) * m_ + c * pairs_ + k] =
                        static_cast<float>((coefficient[(b * count_ + c) * pairs_ + k] +
                                            coefficient[(c * count_ + b) * pairs_ + k]) *
                                           scale(b, c));
        if (d_scale) std::copy(scales.begin(), scales.end(), d_scale);
        if (d_offset) std::copy(offsets.begin(), offsets.end(), d_offset);
    }

private:
    float scale(int64_t b, int64_t c) const { return o_.scale.at(o_.domains[b], o_.domains[c]); }
    double weight(int64_t b, int64_t c) const { return o_.weight.at(o_.domains[b], o_.domains[c]); }
    double logit(int64_t b, int64_t c, float cosine) const {
        return static_cast<double>(cosine) * scale(b, c) +
               o_.offset.at(o_.domains[b], o_.domains[c]);
    }

    // body(anchor, its block, the other block, cosine)
    template <class Body>
    void for_positives(Body&& body, const float* positive) const {
        for (int64_t b = 0; b < count_; ++b)
            for (int64_t c = 0; c < count_; ++c)
                for (int64_t k = 0; b != c && k < pairs_; ++k)
                    body(b * pairs_ + k, b, c, positive[(b * count_ + c) * pairs_ + k]);
    }

    // body(block, other block, first row, tile)
    template <class Body>
    void for_tiles(Body&& body, float* S) const {
        for (size_t r = 0; r + 1 < starts_.size(); ++r)
            for (size_t s = 0; s + 1 < starts_.size(); ++s) {
                const int64_t b = starts_[r], c = starts_[s];
                const Tile tile{S + b * pairs_ * m_ + c * pairs_,
                                (starts_[r + 1] - b) * pairs_,
                                (starts_[s + 1] - c) * pairs_,
                                m_,
                                scale(b, c),
                                o_.offset.at(o_.domains[b], o_.domains[c])};
                body(b, c, b * pairs_, tile);
            }
    }

    BlocksOptions o_;
    const int64_t count_, pairs_;
    std::vector<int64_t> starts_;
};

class Labels : public Dense {
public:
    Labels(int64_t rows, float scale, Ids label)
        // log-sum-exps, mean cosines and numbers of positives
        : Dense(rows, rows, 3 * rows), scale_(away_from_zero(scale)), label_(label) {}

protected:
    void losses(float* S, float* lse, float* loss, float*, Reduction reduction,
                 int threads) const override {
        float *const mean = lse + n_, *const number = lse + 2 * n_;
        for (int64_t i = 0; i < n_; ++i) S[i * (n_ + 1)] = left_out(scale_);
        with_type(label_, [&](auto* label) {
            for_rows(n_, n_, threads, [&](int64_t i) {
                const float* const row = S + i * n_;
                double sum = 0;
                int64_t others = 0;
                for (int64_t j = 0; j < n_; ++j)
                    if (label[j] == label[i] && j != i) {
                        sum += row[j];
                        ++others;
                    }
                mean[i] = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(others, 1)));
                number[i] = static_cast<float>(others);
            });
        });
        const Running rows{scratch(n_), lse};
        begin(n_, rows);
        fastclip::statistics(tile(S), rows, nullptr, threads);
        finish(n_, rows.max, lse);
        std::vector<double> losses(n_);
        for (int64_t i = 0; i < n_; ++i)
            losses[i] = number[i] > 0 ? lse[i] - static_cast<double>(mean[i]) * scale_ : 0.0;
        reduce(losses.data(), n_, with_positive(number), reduction, loss);
    }

    void gradient(float* S, const float* lse, Upstream upstream, float* d_scale, float*,
                  int threads) const override {
        const float *const mean = lse + n_, *const number = lse + 2 * n_;
        const Weights weight(upstream, with_positive(number));
        float *const weights = scratch(2 * n_), *const shares = weights + n_;
        Sums sums;
        for (int64_t i = 0; i < n_; ++i) {
            weights[i] = number[i] > 0 ? static_cast<float>(weight[i]) : 0.0f;
            shares[i] = number[i] > 0 ? weights[i] / number[i] * scale_ : 0.0f;
        }
        const Lines lines{lse, weights};
        fastclip::gradient(tile(S), lines, &lines, d_scale ? &sums : nullptr, threads);
        with_type(label_, [&](auto* label) {
            for_rows(n_, n_, threads, [&](int64_t i) {
                float* const row = S + i * n_;
                const auto own = label[i];
                for (int64_t j = 0; j < n_; ++j)
                    row[j] -= label[j] == own ? shares[i] + shares[j] : 0.0f;
                row[i] = 0.0f;
            });
        });
        // each pair of rows is in the table twice, and holds the gradients of both of its sides
        sums.dot /= 2;
        for (int64_t i = 0; i < n_; ++i) sums.dot -= static_cast<double>(weights[i]) * mean[i];
        if (d_scale) *d_scale = static_cast<float>(sums.dot);
    }

private:
    Tile tile(float* S) const { return {S, n_, n_, n_, scale_, 0.0f}; }
    double with_positive(const float* number) const {
        return static_cast<double>(
            std::max<int64_t>(1, std::count_if(number, number + n_, [](float k) { return k > 0; })));
    }

    const float scale_;
    const Ids label_;
};

}  // namespace

void Dense::forward(float* room, Features features, float* loss, float* accuracy,
                    Reduction reduction, int threads) const {
    const int64_t width = features.width;
    const Operand x{features.x, width, false}, y{features.y, width, true};
    if (features.bf16)
        bf16_product(matrix(x), false, matrix(y), n_, width, m_, room, m_, false, threads);
    else
        float_product(x, y, n_, width, m_, room);
    losses(room, room + n_ * m_, loss, accuracy, reduction, threads);
}

void Dense::backward(float* room, Features features, Upstream upstream, Gradients gradients,
                     int threads) const {
    const int64_t width = features.width;
    gradient(room, room + n_ * m_, upstream, gradients.scale, gradients.offset, threads);
    const auto times = [&](bool transposed, int64_t rows, const void* features_of, int64_t inner,
                           float* out) {
        const Operand g{room, m_, transposed}, f{features_of, width, false};
        if (features.bf16)
            bf16_product(matrix(g), true, matrix(f), rows, inner, width, out, width, false,
                         threads);
        else
            float_product(g, f, rows, inner, width, out);
    };
    if (gradients.x) times(false, n_, features.y, m_, gradients.x);
    if (gradients.y) times(true, gradients.y_rows, features.x, n_, gradients.y);
}

std::unique_ptr<Dense> dense_pairs(const PairsOptions& options) {
    return std::make_unique<Pairs>(options);
}

std::unique_ptr<Dense> dense_sigmoid(int64_t rows, float scale, float offset) {
    return std::make_unique<Sigmoid>(rows, scale, offset);
}

std::unique_ptr<Dense> dense_blocks(const BlocksOptions& options) {
    return std::make_unique<Blocks>(options);
}

std::unique_ptr<Dense> dense_labels(int64_t rows, float scale, Ids label) {
    return std::make_unique<Labels>(rows, scale, label);
}

}  // namespace fastclip
