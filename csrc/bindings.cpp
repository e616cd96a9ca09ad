// The library as a Python module. Arrays come as addresses, as torch's data_ptr() gives them, so
// that one build serves every version of torch; 0 stands for what is not wanted. Float32
// throughout; sums are two float64, of G * cos and of G.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/pool.h"
#include "fastclip/dense.h"
#include "fastclip/epilogues.h"
#include "fastclip/norm.h"
#include "fastclip/product.h"
#ifdef FASTCLIP_CUDA
#include "fastclip/cuda_epilogues.h"
#endif

namespace py = pybind11;
using namespace fastclip;

namespace {

using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Tile make_tile(Address data, int64_t rows, int64_t columns, int64_t stride, Address scale,
               Address offset, py::object diagonal, Address row_id, Address column_id,
               int id_bytes) {
    Tile tile{at(data), rows, columns, stride, *at(scale), offset ? *at(offset) : 0.0f};
    if (!diagonal.is_none()) tile.diagonal = diagonal.cast<int64_t>();
    tile.row_id = at<void>(row_id);
    tile.column_id = at<void>(column_id);
    tile.id_bytes = id_bytes;
    return tile;
}

Biases make_biases(Address row, Address column, Address row_sum, Address column_sum) {
    return {at(row), at(column), at(row_sum), at(column_sum)};
}

void add_statistics(const Tile& tile, Address row_max, Address row_sum, Address column_max,
                    Address column_sum, int threads, const Biases* biases) {
    const Running columns{at(column_max), at(column_sum)};
    statistics(tile, {at(row_max), at(row_sum)}, column_max ? &columns : nullptr, threads, biases);
}

void form_gradient(const Tile& tile, Address row_lse, Address row_weight, Address column_lse,
                   Address column_weight, Address sums, int threads, const Biases* biases) {
    const Lines columns{at(column_lse), at(column_weight)};
    gradient(tile, {at(row_lse), at(row_weight)}, column_lse ? &columns : nullptr, at<Sums>(sums),
             threads, biases);
}

void form_exponentials(const Tile& tile, Address anchor, Address row_sum, Address column_sum,
                       int threads, const Biases* biases) {
    exponentials(tile, *at(anchor), at(row_sum), at(column_sum), threads, biases);
}

double weigh_exponentials(int64_t rows, int64_t columns, Address E, int64_t E_stride,
                          Address scale, Address u, Address v, Address out, int64_t out_stride,
                          int threads, const Biases* biases) {
    return weigh(rows, columns, at(E), E_stride, *at(scale), at(u), at(v), at(out), out_stride,
                 threads, biases);
}

void keep_rows(const Tile& tile, Address row_max, Address running_max, Address running_sum,
               Address dot, int threads) {
    begin_rows(tile, at(row_max), {at(running_max), at(running_sum)}, at(dot), threads);
}

void finish_rows(const Tile& tile, Address row_max, Address running_max, Address factor,
                 Address out, int64_t out_stride, int threads) {
    end_rows(tile, at(row_max), at(running_max), at(factor), at(out), out_stride, threads);
}

void add_sigmoid(const Tile& tile, Address weight, Address row_sum, Address sums, int threads,
                 bool positive_ids) {
    sigmoid(tile, at(weight), at(row_sum), at<Sums>(sums), threads, positive_ids);
}

void multiply(Address a, int64_t a_row, int64_t a_column, bool wide, Address b, int64_t b_row,
              int64_t b_column, int64_t rows, int64_t inner, int64_t columns, Address out,
              int64_t out_stride, bool add, int threads) {
    bf16_product({at<void>(a), a_row, a_column}, wide, {at<void>(b), b_row, b_column}, rows,
                 inner, columns, at(out), out_stride, add, threads);
}

// A number, or where one is.
using Number = std::pair<double, Address>;
float value_of(const Number& number) {
    return number.second ? *at(number.second) : static_cast<float>(number.first);
}

std::unique_ptr<Dense> pairs(int64_t rows, int64_t columns, double value, Address scale, bool both,
                             int64_t first_negative, double smoothing, Address positive,
                             Address row_id, Address column_id, int id_bytes) {
    return dense_pairs({rows, columns, value_of({value, scale}), both, first_negative, smoothing,
                        at<int64_t>(positive), {at<void>(row_id), id_bytes},
                        {at<void>(column_id), id_bytes}});
}

std::unique_ptr<Dense> sigmoids(int64_t rows, double value, Address scale, double offset_value,
                                Address offset) {
    return dense_sigmoid(rows, value_of({value, scale}), value_of({offset_value, offset}));
}

// `width` 0: a number.
Table table(double value, Address entries, int64_t width) {
    if (!width) return {{value_of({value, entries})}, 0};
    return {{at(entries), at(entries) + width * width}, width};
}

std::unique_ptr<Dense> blocks(int64_t pairs, std::vector<int> domains, double scale_value,
                              Address scale, int64_t scale_width, double offset_value,
                              Address offset, int64_t offset_width, double weight_value,
                              Address weight, int64_t weight_width) {
    return dense_blocks({pairs, std::move(domains), table(scale_value, scale, scale_width),
                         table(offset_value, offset, offset_width),
                         table(weight_value, weight, weight_width)});
}

std::unique_ptr<Dense> labels(int64_t rows, double value, Address scale, Address label,
                              int bytes) {
    return dense_labels(rows, value_of({value, scale}), {at<void>(label), bytes});
}

void dense_forward(const Dense& dense, Address room, Address x, Address y, int64_t width, bool bf16,
                   Address loss, Address accuracy, int reduction, int threads) {
    dense.forward(at(room), {at<void>(x), at<void>(y), width, bf16}, at(loss), at(accuracy),
                  static_cast<Reduction>(reduction), threads);
}

void dense_backward(const Dense& dense, Address room, Address x, Address y, int64_t width,
                    bool bf16, Address upstream, int reduction, Address d_x, Address d_y,
                    int64_t y_rows, Address d_scale, Address d_offset, int threads) {
    dense.backward(at(room), {at<void>(x), at<void>(y), width, bf16},
                   {at(upstream), static_cast<Reduction>(reduction)},
                   {at(d_x), at(d_y), y_rows, at(d_scale), at(d_offset)}, threads);
}

double add_squares(const std::vector<std::pair<Address, int64_t>>& tensors, int threads) {
    std::vector<Values> values;
    for (const auto& [data, count] : tensors) values.push_back({at(data), count});
    return sum_of_squares(values, threads);
}

py::list usable() {
    py::list names;
    for (const char* const* name = usable_instructions(); *name; ++name) names.append(*name);
    return names;
}

#ifdef FASTCLIP_CUDA
#ifdef FASTCLIP_EMULATED
constexpr bool EMULATED = true;
#else
constexpr bool EMULATED = false;
#endif

// Addresses are the device's; a matrix is (address, stride, type).
using Place = std::tuple<Address, int64_t, int>;

cuda::Matrix matrix(const Place& place) {
    const auto [data, stride, type] = place;
    return {at<void>(data), stride, static_cast<cuda::Type>(type)};
}

// (pieces, lines, maxima and sums of the pieces, running ones).
using Pieces = std::tuple<int64_t, int64_t, Address, Address, Address, Address>;

cuda::Partials partials(const Pieces& lines) {
    const auto [pieces, count, part_max, part_sum, max, sum] = lines;
    return {pieces, count, {at(part_max), at(part_sum)}, {at(max), at(sum)}};
}

cuda::Tile make_cuda_tile(Address data, int64_t rows, int64_t columns, int64_t stride,
                          Address scale, Address offset, py::object diagonal, Address row_id,
                          Address column_id, int id_bytes) {
    cuda::Tile tile{at(data), rows, columns, stride, at(scale), at(offset), columns};
    if (!diagonal.is_none()) tile.diagonal = diagonal.cast<int64_t>();
    tile.row_id = at<void>(row_id);
    tile.column_id = at<void>(column_id);
    tile.id_bytes = id_bytes;
    return tile;
}

void add_cuda(py::module_ module) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    using Tile = cuda::Tile;
    py::class_<Tile>(module, "Tile", py::module_local())
        .def(py::init(&make_cuda_tile))
        .def_property_readonly("pieces", [](const Tile& tile) {
            return py::make_tuple(tile.pieces_down(), tile.pieces_across());
        });
    module.attr("WARPS") = cuda::WARPS;
    module.attr("EMULATED") = EMULATED;
    module.def("driver_unavailable_reason", &cuda::driver_unavailable_reason);
    module.def(
        "statistics",
        [](const Tile& tile, Address row_max, Address row_sum, Address column_max,
           Address column_sum, bool maxima, const Biases* biases, Address stream) {
            cuda::statistics(tile, {at(row_max), at(row_sum)}, {at(column_max), at(column_sum)},
                             maxima, biases, at<void>(stream));
        },
        unlocked);
    module.def(
        "begin_rows",
        [](const Tile& tile, Address row_max, Address row_sum, Address row_dot, Address stream) {
            cuda::begin_rows(tile, {at(row_max), at(row_sum)}, at(row_dot), at<void>(stream));
        },
        unlocked);
    module.def(
        "merge",
        [](Pieces rows, Pieces columns, Address part_dot, Address offset, Address dot,
           Address stream) {
            cuda::merge(partials(rows), partials(columns), at(part_dot), at(offset), at(dot),
                        at<void>(stream));
        },
        unlocked);
    module.def(
        "end_rows",
        [](const Tile& tile, Address part_max, Address row_max, Address factor, Place out,
           Address stream) {
            cuda::end_rows(tile, at(part_max), at(row_max), at(factor), matrix(out),
                           at<void>(stream));
        },
        unlocked);
    module.def(
        "gradient",
        [](const Tile& tile, Address row_lse, Address row_weight, Address column_lse,
           Address column_weight, Place out, Address sums, const Biases* biases,
           Address stream) {
            cuda::gradient(tile, {at(row_lse), at(row_weight)},
                           {at(column_lse), at(column_weight)}, matrix(out), at(sums), biases,
                           at<void>(stream));
        },
        unlocked);
    module.def(
        "sigmoid",
        [](const Tile& tile, Address weight, Address row_sum, Place out, Address sums,
           bool positive_ids, Address stream) {
            cuda::sigmoid(tile, at(weight), at(row_sum), matrix(out), at(sums), positive_ids,
                          at<void>(stream));
        },
        unlocked);
    module.def(
        "finish",
        [](int64_t rows, int64_t width, Place total, Address coefficient, Place partner,
           Place out, Address stream) {
            cuda::finish(rows, width, matrix(total), at(coefficient), matrix(partner),
                         matrix(out), at<void>(stream));
        },
        unlocked);
    module.def(
        "row_dot",
        [](int64_t rows, int64_t width, Place a, Place b, Address out, Address stream) {
            cuda::row_dot(rows, width, matrix(a), matrix(b), at(out), at<void>(stream));
        },
        unlocked);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    module.attr("ABI") = ABI;
    module.attr("VERSION") = FASTCLIP_VERSION;
    py::class_<Tile>(module, "Tile", py::module_local()).def(py::init(&make_tile));
    py::class_<Biases>(module, "Biases", py::module_local()).def(py::init(&make_biases));
    const py::arg arg;
    const py::arg_v biases = py::arg("biases") = static_cast<const Biases*>(nullptr);
    module.def("statistics", &add_statistics, arg, arg, arg, arg, arg, arg, biases, unlocked);
    module.def("gradient", &form_gradient, arg, arg, arg, arg, arg, arg, arg, biases, unlocked);
    module.def("exponentials", &form_exponentials, arg, arg, arg, arg, arg, biases, unlocked);
    module.def("weigh", &weigh_exponentials, arg, arg, arg, arg, arg, arg, arg, arg, arg, arg,
               biases, unlocked);
    module.def("begin_rows", &keep_rows, unlocked);
    module.def("end_rows", &finish_rows, unlocked);
    module.def("sigmoid", &add_sigmoid, unlocked);
    module.def("sum_of_squares", &add_squares, unlocked);
    py::class_<Dense>(module, "Dense", py::module_local())
        .def_property_readonly("room", &Dense::room)
        .def_property_readonly("anchors", &Dense::anchors)
        .def("forward", &dense_forward, unlocked)
        .def("backward", &dense_backward, unlocked);
    module.def("dense_pairs", &pairs, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
               py::arg(), py::arg(), py::arg("positive_index") = 0, py::arg("row_id") = 0,
               py::arg("column_id") = 0, py::arg("id_bytes") = 0);
    module.def("dense_sigmoid", &sigmoids);
    module.def("dense_blocks", &blocks);
    module.def("dense_labels", &labels);
    module.def("bf16_product", &multiply, unlocked);
    module.def("use_blas", [](Address sgemm) { return use_blas(at<void>(sgemm)); });
    module.def("has_bf16_product", &has_bf16_product);
    module.def("instructions", &instructions);
    module.def("usable_instructions", &usable);
    module.def("use_instructions", &use_instructions);
    module.def("use_team", [](Address gomp_parallel) { use_team(at<void>(gomp_parallel)); });
#ifdef FASTCLIP_CUDA
    add_cuda(module.def_submodule("cuda"));
#endif
}
