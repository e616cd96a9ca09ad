// Products with bf16 features, summed and returned in float32, unrounded, for processors that
// multiply bf16 (AVX512-BF16); and products in float32 by the BLAS of the process.
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

// Use a BLAS that is in the process already, given by the address of its Fortran sgemm. False where
// a product by it is wrong, or it is null: there are no products in float32 then.
bool use_blas(void* sgemm);

// A row-major matrix of float32 and the distance of its rows, or the transposed one.
struct Operand {
    const void* data;
    int64_t stride;
    bool transposed;
};

// out (rows x columns, contiguous) = A (rows x inner) B (inner x columns).
void float_product(Operand a, Operand b, int64_t rows, int64_t inner, int64_t columns, float* out);

}  // namespace fastclip
