// bf16 products against double, every layout, with and without a remainder in each dimension; the
// same bits for any number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "fastclip/product.h"

using namespace fastclip;

namespace {

float rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits &= 0xffff0000u;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Entries with one stride 1, as float32 and as bf16.
struct Entries {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    int64_t row_stride, column_stride;

    Entries(int64_t rows, int64_t columns, bool by_rows, bool is_bf16, unsigned seed)
        : row_stride(by_rows ? columns + 5 : 1), column_stride(by_rows ? 1 : rows + 3) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        wide.resize(by_rows ? rows * row_stride : columns * column_stride);
        for (float& entry : wide) {
            entry = is_bf16 ? rounded(normal(random)) : normal(random);
            uint32_t bits;
            std::memcpy(&bits, &entry, 4);
            narrow.push_back(static_cast<uint16_t>(bits >> 16));
        }
    }
    double at(int64_t i, int64_t j) const { return wide[i * row_stride + j * column_stride]; }
    Matrix matrix(bool is_bf16) const {
        const void* const data = is_bf16 ? static_cast<const void*>(narrow.data()) : wide.data();
        return {data, row_stride, column_stride};
    }
};

int check(int64_t rows, int64_t inner, int64_t columns, bool wide, bool a_by_rows, bool b_by_rows,
          bool add) {
    const Entries a(rows, inner, a_by_rows, !wide, 1), b(inner, columns, b_by_rows, true, 2);
    const int64_t stride = columns + 2;
    std::vector<float> first(rows * stride, 0.5f), again(first);
    bf16_product(a.matrix(!wide), wide, b.matrix(true), rows, inner, columns, first.data(),
                 stride, add, 1);
    bf16_product(a.matrix(!wide), wide, b.matrix(true), rows, inner, columns, again.data(),
                 stride, add, 3);
    double worst = 0;
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            double want = add ? 0.5 : 0, size = 1;
            for (int64_t k = 0; k < inner; ++k) {
                want += a.at(i, k) * b.at(k, j);
                size += std::fabs(a.at(i, k) * b.at(k, j));
            }
            worst = std::fmax(worst, std::fabs(first[i * stride + j] - want) / size);
        }
        if (first[i * stride + columns] != 0.5f) worst = INFINITY;
    }
    const bool good = worst <= 1e-6 && first == again;
    if (!good)
        std::printf("FAILED: %d x %d x %d, wide %d, rows of A %d, of B %d, add %d: %g\n",
                    static_cast<int>(rows), static_cast<int>(inner), static_cast<int>(columns),
                    wide, a_by_rows, b_by_rows, add, worst);
    return !good;
}

}  // namespace

int main() {
    if (!has_bf16_product()) {
        std::printf("left out: this processor or build has no bf16 products\n");
        return EXIT_SUCCESS;
    }
    int failures = 0;
    const int64_t sizes[][3] = {{1, 1, 1},     {1, 2, 1},      {5, 3, 7},     {12, 64, 32},
                                {13, 1, 33},   {100, 77, 50},  {97, 514, 65}, {130, 1030, 40},
                                {40, 16, 600}, {700, 130, 20}, {16, 512, 512}};
    for (const auto& size : sizes)
        for (bool add : {false, true})
            for (bool either : {false, true}) {
                failures += check(size[0], size[1], size[2], false, true, either, add);
                failures += check(size[0], size[1], size[2], true, either, true, add);
            }
    std::printf(failures ? "%d failures\n" : "all good\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
