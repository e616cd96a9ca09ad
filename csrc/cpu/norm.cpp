#include "fastclip/norm.h"

#include <algorithm>

#include "pool.h"

namespace fastclip {
namespace {

// Summed in float32, as many lanes beside each other; double from there on.
constexpr int64_t BLOCK = 1024;
constexpr int LANES = 16;
// Blocks below which a further thread costs more than it saves.
constexpr int64_t LEAST_BLOCKS = 64;

double of_block(const float* values, int64_t count) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    double sum = 0;
    for (; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
    for (float lane : lanes) sum += lane;
    return sum;
}

}  // namespace

double sum_of_squares(const std::vector<Values>& tensors, int threads) {
    // every block has its place, so that the sum's order does not depend on the threads
    std::vector<Values> blocks;
    for (const Values& tensor : tensors)
        for (int64_t at = 0; at < tensor.count; at += BLOCK)
            blocks.push_back({tensor.data + at, std::min(BLOCK, tensor.count - at)});
    std::vector<double> sums(blocks.size());
    const int64_t count = static_cast<int64_t>(blocks.size());
    const int parts = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(threads, count / LEAST_BLOCKS)));
    run(parts, [&](int part) {
        for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
            sums[i] = of_block(blocks[i].data, blocks[i].count);
    });
    double sum = 0;
    for (double one : sums) sum += one;
    return sum;
}

}  // namespace fastclip
