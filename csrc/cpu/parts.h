// How the rows of a table are cut for the threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastclip {

// Entries below which a further thread costs more than it saves: about ten microseconds of work.
constexpr int64_t LEAST_PART = 1 << 15;

// Equal parts of so many rows, one a thread.
struct Parts {
    int64_t rows;
    int count;

    Parts(int64_t rows, int64_t columns, int threads)
        : rows(rows), count(static_cast<int>(std::max<int64_t>(
                          1, std::min<int64_t>({threads, rows, rows * columns / LEAST_PART})))) {}
    int64_t begin(int part) const { return rows * part / count; }
    int64_t end(int part) const { return begin(part + 1); }
    int64_t largest() const { return (rows + count - 1) / count; }
};

}  // namespace fastclip
