// The sum of the squares of many tensors' entries: a model's gradient norm in one call.
#pragma once

#include <cstdint>
#include <vector>

namespace fastclip {

struct Values {
    const float* data;
    int64_t count;
};

// The same bits for any number of threads. Infinite or NaN where an entry, or its square, is.
double sum_of_squares(const std::vector<Values>& tensors, int threads);

}  // namespace fastclip
