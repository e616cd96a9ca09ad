// Products with bf16 features, summed and returned in float32, unrounded, for processors that
// multiply bf16 (AVX512-BF16).
#pragma once

#include <cstdint>

namespace fastclip {

// A matrix by address and strides in entries, one of them 1.
struct Matrix {
    const void* data;
    int64_t row_stride, column_stride;
};

// Whether this machine has the instructions and the build knew them.
bool has_bf16_product();

// out (rows x columns, float32) = or, with `add`, += A (rows x inner) B (inner x columns). B is
// bf16. A is bf16 with contiguous rows, or float32 (`wide`), where B's rows are contiguous and its
// entries are widened. The number of threads does not change the bits.
void bf16_product(Matrix a, bool wide, Matrix b, int64_t rows, int64_t inner, int64_t columns,
                  float* out, int64_t out_stride, bool add, int threads);

}  // namespace fastclip
