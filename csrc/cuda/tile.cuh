// A lane's part of a tile: R rows and C columns, as cosines in memory and as logits in registers.
#pragma once

#include "device.cuh"

namespace fastclip {
namespace cuda {

// Where this lane's entries are.
struct Place {
    int64_t down, across;  // the piece
    int64_t row, column;   // of the first entry
    int rows, columns;     // how many of R and C are inside the tile
    bool whole;            // whether that is so for all entries of the warp

    __device__ explicit Place(const Tile& tile) {
        const unsigned pieces = static_cast<unsigned>(
            (tile.columns + TILE_COLUMNS - 1) / TILE_COLUMNS);
        down = blockIdx.x / pieces;
        across = blockIdx.x % pieces;
        row = down * TILE_ROWS + warp_index() * R;
        column = across * TILE_COLUMNS + lane_index() * C;
        rows = inside(tile.rows - row, R);
        columns = inside(tile.columns - column, C);
        whole = rows == R && (across + 1) * TILE_COLUMNS <= tile.columns;
    }
    static __device__ int inside(int64_t left, int most) {
        return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
    }
    // the warp's number among all pieces'
    __device__ int64_t warp() const { return int64_t{blockIdx.x} * WARPS + warp_index(); }
    // whether this lane is the one to store what `lines_over_lanes` left in it
    __device__ bool stores_line() const {
        return lane_index() % LANES_A_LINE == 0 && own_line() < rows;
    }
    // where a workspace (pieces across, rows) has this lane's line
    __device__ int64_t line(const Tile& tile) const {
        return across * tile.rows + row + own_line();
    }
};

// This lane's entries of a matrix that has the tile's shape.
template <class T>
struct Entries {
    T* first;
    int64_t stride;
    int rows, columns;
    bool vectors;

    __device__ Entries(T* data, int64_t stride, const Place& at)
        : first(data + at.row * stride + at.column), stride(stride), rows(at.rows),
          columns(at.columns), vectors(at.whole && aligned(data, stride)) {}

    __device__ void get(int k, float (&v)[C]) const {
        load(first + k * stride, k < rows ? columns : 0, vectors, v);
    }
    __device__ void put(int k, const float (&v)[C]) const {
        store(first + k * stride, k < rows ? columns : 0, vectors, v);
    }
};

inline __device__ int64_t id_at(const void* ids, int bytes, int64_t index) {
    return bytes == 4 ? static_cast<const int32_t*>(ids)[index]
                      : static_cast<const int64_t*>(ids)[index];
}

// Calls `visit(k, c)` where ids agree; outside of the tile, where they are 0, as well.
template <class Visit>
__device__ void where_ids_agree(const Tile& tile, const Place& at, Visit&& visit) {
    int64_t column_id[C];
    for (int c = 0; c < C; ++c)
        column_id[c] = c < at.columns ? id_at(tile.column_id, tile.id_bytes, at.column + c) : 0;
    for (int k = 0; k < R; ++k) {
        const int64_t row_id = k < at.rows ? id_at(tile.row_id, tile.id_bytes, at.row + k) : 0;
        for (int c = 0; c < C; ++c)
            if (row_id == column_id[c]) visit(k, c);
    }
}

// scale * cos; `left_out` where an entry is left out or outside of the tile.
template <bool BY_IDS = true>
__device__ void logits(const Tile& tile, const Place& at, float left_out, float (&v)[R][C]) {
    const Entries<float> cosines(tile.data, tile.stride, at);
    const float scale = *tile.scale;
    for (int k = 0; k < R; ++k) cosines.get(k, v[k]);
    for (int k = 0; k < R; ++k)
        for (int c = 0; c < C; ++c) v[k][c] *= scale;
    const int64_t away = tile.diagonal + at.row - at.column;
    if (-R < away && away < C) {
        const int on_diagonal = static_cast<int>(away);
        for (int k = 0; k < R; ++k)
            for (int c = 0; c < C; ++c)
                if (c - k == on_diagonal) v[k][c] = left_out;
    }
    if (BY_IDS && tile.row_id)
        where_ids_agree(tile, at, [&](int k, int c) { v[k][c] = left_out; });
    if (!at.whole) {
        for (int k = 0; k < R; ++k)
            for (int c = 0; c < C; ++c)
                if (k >= at.rows || c >= at.columns) v[k][c] = left_out;
    }
}

}  // namespace cuda
}  // namespace fastclip
