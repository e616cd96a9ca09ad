// Losses over a whole table of S in memory, for batches so small that the number of calls counts:
// one call forward, one backward, products included. By address; float32 but for features of
// bfloat16 where product.h multiplies these. Built on the epilogues and with their promises.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fastclip {

// Integers of 4 or 8 bytes, or nothing.
struct Ids {
    const void* data = nullptr;
    int bytes = 0;
};

enum class Reduction { NONE, SUM, MEAN };

// The gradient of the loss: of each anchor or, reduced, one number.
struct Upstream {
    const float* values;
    Reduction reduction;
};

// Contiguous rows of one width, X and Y; of a symmetric S they are the same.
struct Features {
    const void *x, *y;
    int64_t width;
    bool bf16;
};

// Null where it is not wanted. `y` has only the first `y_rows`; nothing where S is symmetric.
struct Gradients {
    float *x, *y;
    int64_t y_rows;
    float *scale, *offset;
};

class Dense {
public:
    Dense(int64_t rows, int64_t columns, int64_t kept)
        : n_(rows), m_(columns), kept_(kept) {}
    virtual ~Dense() = default;

    // Floats that a forward fills for the backward: S, and `kept` beside it.
    int64_t room() const { return n_ * m_ + kept_; }
    int64_t anchors() const { return n_; }
    // `loss` is one number or, not reduced, one an anchor. `accuracy`, unless null, takes the share
    // of positives above all negatives, of rows and, where columns are anchors too, of columns.
    void forward(float* room, Features features, float* loss, float* accuracy, Reduction reduction,
                 int threads) const;
    // `room` is overwritten.
    void backward(float* room, Features features, Upstream upstream, Gradients gradients,
                  int threads) const;

protected:
    // From the cosines, which stay as they are but for those that are left out: marked as such.
    virtual void losses(float* cosines, float* kept, float* loss, float* accuracy,
                        Reduction reduction, int threads) const = 0;
    // The gradient by the cosines in their place, where these are symmetric that by (i, j) and by
    // (j, i) together.
    virtual void gradient(float* cosines, const float* kept, Upstream upstream, float* d_scale,
                          float* d_offset, int threads) const = 0;

    const int64_t n_, m_;

private:
    const int64_t kept_;
};

// Each row's softmax loss or, with `both`, half of it and half of its column's. Row i's positive
// is column positive[i], or i. Columns of a row's id and those before first_negative are no
// negatives. Smoothing, with `both` alone, adds smoothing * (positive - mean of the candidates).
struct PairsOptions {
    int64_t rows, columns;
    float scale;
    bool both;
    int64_t first_negative;
    double smoothing;
    const int64_t* positive;
    Ids row_id, column_id;
};
std::unique_ptr<Dense> dense_pairs(const PairsOptions& options);

// Each row's sum of softplus(S), and for the diagonal, its positive, of softplus(-S).
std::unique_ptr<Dense> dense_sigmoid(int64_t rows, float scale, float offset);

// Entries by pair of domains, (a, b) read with a <= b; one number stands for all.
struct Table {
    std::vector<float> entries;
    int64_t width;  // 0: one number

    int64_t index(int a, int b) const {
        return width ? (a < b ? a * width + b : b * width + a) : 0;
    }
    float at(int a, int b) const { return entries[index(a, b)]; }
};

// Blocks of rows in one pair order. A row's positives are its pair's in the other blocks, its
// negatives the rows of all other pairs.
struct BlocksOptions {
    int64_t pairs;
    std::vector<int> domains;
    Table scale, offset, weight;
};
std::unique_ptr<Dense> dense_blocks(const BlocksOptions& options);

// A row's positives are the others of its label, averaged outside the logarithm, its negatives all
// others. The mean is over rows with a positive.
std::unique_ptr<Dense> dense_labels(int64_t rows, float scale, Ids label);

}  // namespace fastclip
