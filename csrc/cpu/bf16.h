// The part of a product that one thread does.
#pragma once

#include "fastclip/product.h"

namespace fastclip {

// Room for one thread, in bytes.
int64_t bf16_room();

void bf16_part(Matrix a, bool wide, Matrix b, int64_t rows, int64_t inner, int64_t columns,
               float* out, int64_t out_stride, bool add, char* room);

}  // namespace fastclip
