// The last pass over gradients, and row-wise products: a warp a row.
#include <type_traits>

#include "device.cuh"

namespace fastclip {
namespace cuda {
namespace {

// A row-major matrix whose rows a warp walks along.
template <class T>
struct Rows {
    T* data;
    int64_t stride;

    __device__ bool takes_vectors(int64_t width) const {
        return aligned(data, stride) && width % C == 0;
    }
    __device__ T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

__device__ int64_t row_of_warp() { return int64_t{blockIdx.x} * WARPS + warp_index(); }
__device__ int left(int64_t width, int64_t column) {
    return width - column < C ? static_cast<int>(width - column) : C;
}

template <class Partner, class Out>
__global__ void __launch_bounds__(THREADS)
    finish_kernel(int64_t rows, int64_t width, Rows<const float> total, const float* coefficient,
                  Rows<const Partner> partner, Rows<Out> out) {
    const int64_t i = row_of_warp();
    if (i >= rows) return;
    const float factor = coefficient[i];
    const bool vectors = total.takes_vectors(width) && out.takes_vectors(width) &&
                         partner.takes_vectors(width);
    for (int64_t d = lane_index() * C; d < width; d += LANES * C) {
        float sum[C], other[C];
        load(total.at(i, d), left(width, d), vectors, sum);
        load(partner.at(i, d), left(width, d), vectors, other);
        for (int c = 0; c < C; ++c) sum[c] += factor * other[c];
        store(out.at(i, d), left(width, d), vectors, sum);
    }
}

template <class A, class B>
__global__ void __launch_bounds__(THREADS)
    row_dot_kernel(int64_t rows, int64_t width, Rows<const A> a, Rows<const B> b, float* out) {
    const int64_t i = row_of_warp();
    if (i >= rows) return;
    const bool vectors = a.takes_vectors(width) && b.takes_vectors(width);
    float sum = 0.0f;
    for (int64_t d = lane_index() * C; d < width; d += LANES * C) {
        float u[C], v[C];
        load(a.at(i, d), left(width, d), vectors, u);
        load(b.at(i, d), left(width, d), vectors, v);
        for (int c = 0; c < C; ++c) sum += u[c] * v[c];
    }
    sum = over_lanes(sum, Plus{});
    if (lane_index() == 0) out[i] = sum;
}

// Call `work` with a matrix as what it is.
template <class Work>
void with_type(Matrix m, Work&& work) {
    if (m.type == Type::F32) work(Rows<float>{static_cast<float*>(m.data), m.stride});
    if (m.type == Type::BF16)
        work(Rows<__nv_bfloat16>{static_cast<__nv_bfloat16*>(m.data), m.stride});
    if (m.type == Type::F16) work(Rows<__half>{static_cast<__half*>(m.data), m.stride});
}

int64_t blocks(int64_t rows) { return (rows + WARPS - 1) / WARPS; }

}  // namespace

void finish(int64_t rows, int64_t width, Matrix total, const float* coefficient, Matrix partner,
            Matrix out, void* stream) {
    const Rows<const float> sum{static_cast<float*>(total.data), total.stride};
    with_type(partner, [&](auto other) {
        with_type(out, [&](auto to) {
            using Partner = std::remove_pointer_t<decltype(other.data)>;
            using Out = std::remove_pointer_t<decltype(to.data)>;
            launch("finish", finish_kernel<Partner, Out>, blocks(rows), stream, rows, width, sum,
                   coefficient, Rows<const Partner>{other.data, other.stride}, to);
        });
    });
}

void row_dot(int64_t rows, int64_t width, Matrix a, Matrix b, float* out, void* stream) {
    with_type(a, [&](auto first) {
        with_type(b, [&](auto second) {
            using A = std::remove_pointer_t<decltype(first.data)>;
            using B = std::remove_pointer_t<decltype(second.data)>;
            launch("row_dot", row_dot_kernel<A, B>, blocks(rows), stream, rows, width,
                   Rows<const A>{first.data, first.stride},
                   Rows<const B>{second.data, second.stride}, out);
        });
    });
}

}  // namespace cuda
}  // namespace fastclip
