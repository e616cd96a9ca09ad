"""The sigmoid loss of a tile of S = scale * X @ Y.T + offset and its gradient, S never in memory.

    row sums of softplus(S);   G_ij = weight_i sigmoid(S_ij), times the scale, rounded once

over entries that are not left out; float32 sums of G * cos and G. Entries whose ids agree are left
out or, on request, are positives, which have -S and -G: t = -S is formed first, as sigmoid(S) - 1
would lose its digits. X (R, D), Y (S, D). Partial
sums are (column tiles, R) and (tiles, 2): no atomics, bitwise reproducible.

With f = exp(S), softplus(S) = log(1 + f) and sigmoid(S) = f / (1 + f): one exponential and one
reciprocal an entry, but no logarithm. The product of 64 of the 1 + f is formed less 1, as
(p, f) -> p + f + p f, which loses none of f's bits near the usual start, S = -10, and each row has
one logarithm for 64 entries. Where the product passes float32's range (softplus above 1.3 in the
mean, a tile that training does not meet) a second launch, which returns at once where there is no
such tile, works on the tile entry by entry, about exp(-|S|), and overwrites what is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import (
    Tiling,
    launch,
    operands,
    persistent_programs,
    product_options,
    programs_of,
)
from fastclip.kernels.tile import (
    LEFT_OUT,
    LN2,
    LOG2E,
    NO_DIAGONAL,
    any_raised,
    cosines,
    leave_out,
    parts_of,
    rounded,
    tile_indices,
    visits,
)

NUMBERS = ["rows", "columns", "diagonal", "programs"]
VECTORS = [
    *("scale_ptr", "offset_ptr", "weight_ptr", "row_id_ptr", "column_id_ptr", "row_sum_ptr"),
    *("scalars_ptr", "beyond_ptr"),
]


# what is done where ids agree
NO_IDS, IDS_LEFT_OUT, IDS_POSITIVE = 0, 1, 2
# entries whose product float32 can hold where each is 1 + 1, and beyond which f is not used
PRODUCT = tl.constexpr(64)
LARGEST = tl.constexpr(2.0**126)
# of a tile that goes entry by entry
ENTRIES_PARTS = 4


@triton.jit
def _log1p_of_fraction(e):
    # log(1 + e) / e on [0, 1], degree 8 at Chebyshev nodes: relative error 3e-8
    p = 0.005253457929939032 * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    return (p * e + 1.0) * e


@triton.jit
def _log1p(p):
    """log(1 + p), p in [0, 2^126)."""
    above = p + 1.0
    bits = above.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # below 1 p itself, all of its bits
    fraction = tl.where(p < 1.0, p, mantissa - 1.0)
    return tl.where(p < 1.0, 0.0, exponent) * LN2 + _log1p_of_fraction(fraction)


@triton.jit
def _times(p, q):
    # (1 + p) (1 + q) - 1
    return tl.fma(p, q, p + q)


@triton.jit
def _products(f, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, EMULATE: tl.constexpr):
    """Products of each row's 1 + f, less 1, over PRODUCT columns at a time."""
    COUNT: tl.constexpr = PRODUCT if BLOCK_S > PRODUCT else BLOCK_S
    f = tl.reshape(f, (BLOCK_R, BLOCK_S // COUNT, COUNT))
    if EMULATE:
        # the interpreter would combine entry by entry in Python
        f = _emulated_product(f, BLOCK_R, BLOCK_S // COUNT, COUNT)
    else:
        f = tl.reduce(f, 2, _times)
    return f


@triton.jit
def _emulated_product(f, R: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    if COUNT > 1:
        p, q = tl.split(tl.reshape(f, (R, GROUPS, COUNT // 2, 2)))
        f = _emulated_product(_times(p, q), R, GROUPS, COUNT // 2)
    else:
        f = tl.reshape(f, (R, GROUPS))
    return f


@triton.jit
def _reciprocal(x, EMULATE: tl.constexpr):
    """1 / x to an ulp, in one instruction on the device."""
    if EMULATE:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _where_equal(row_id, column_id, value, other):
    # no branch around it as in `leave_out`: that would take registers, and spill
    return tl.where(row_id[:, None] == column_id[None, :], value, other)


@triton.jit
def _parts(
    cos,
    scale,
    offset,
    weight_ptr,
    row_id_ptr,
    column_id_ptr,
    p_row_sum,
    g_ptr,
    p_scalars,
    stride_g,
    rows,
    columns,
    diagonal,
    first_r,
    first_s,
    ENTRIES: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    IDS: tl.constexpr,
    GRADIENT: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Everything of a tile, stored; whether a row's product is beyond what it can hold.

    Not if the tile goes entry by entry (ENTRIES).
    """
    PART_S: tl.constexpr = BLOCK_S // PARTS
    i_r = first_r + tl.arange(0, BLOCK_R)
    weight = tl.load(weight_ptr + i_r, mask=i_r < rows, other=0.0)
    row_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_R,), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    beyond = tl.zeros((BLOCK_R,), dtype=tl.int32)
    parts = parts_of(cos, PARTS)
    for part in tl.static_range(PARTS):
        i_s = first_s + part * PART_S + tl.arange(0, PART_S)
        logits = parts[part] * (scale * LOG2E) + offset * LOG2E
        if IDS > 0:
            row_id = tl.load(row_id_ptr + i_r, mask=i_r < rows, other=0)
            column_id = tl.load(column_id_ptr + i_s, mask=i_s < columns, other=0)
            equal = -logits if IDS == 2 else LEFT_OUT
            logits = _where_equal(row_id, column_id, equal, logits)
        logits = leave_out(
            logits, g_ptr, g_ptr, rows, columns, diagonal,
            i_r, i_s, first_r, first_s + part * PART_S, HAS_DIAGONAL, False, LEFT_OUT,
            BLOCK_R, PART_S,
        )  # fmt: skip
        if ENTRIES:
            e = tl.exp2(-tl.abs(logits))
            row_sum += tl.sum(tl.maximum(logits, 0.0) * LN2 + _log1p_of_fraction(e), 1)
            slope = tl.where(logits >= 0.0, 1.0, e) / (1.0 + e)
        else:
            f = tl.exp2(logits)
            product = _products(f, BLOCK_R, PART_S, EMULATE)
            # a comparison that NaN fails
            beyond |= tl.max(tl.where(product < LARGEST, 0, 1), 1)
            row_sum += tl.sum(_log1p(product), 1)
            slope = f * _reciprocal(1.0 + f, EMULATE)
        if GRADIENT:
            if IDS == 2:
                slope = _where_equal(row_id, column_id, -slope, slope)
            o_g = tl.arange(0, BLOCK_R)[:, None] * stride_g + tl.arange(0, PART_S)[None, :]
            p_g = g_ptr + first_r.to(tl.int64) * stride_g + first_s + part * PART_S + o_g
            tl.store(p_g, rounded(slope * (weight * scale)[:, None], p_g, EMULATE))
            dot += tl.sum(slope * parts[part], 1)
            total += tl.sum(slope, 1)
    tl.store(p_row_sum + i_r, row_sum, mask=i_r < rows)
    if GRADIENT:
        # one reduction for both
        both = tl.join(dot * weight, total * weight)
        tl.store(p_scalars + tl.arange(0, 2), tl.sum(both, 0))
    return beyond


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def sigmoid_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    offset_ptr,
    weight_ptr,
    row_id_ptr,
    column_id_ptr,
    row_sum_ptr,
    g_ptr,
    scalars_ptr,
    beyond_ptr,
    stride_x,
    stride_y,
    stride_g,
    rows,
    columns,
    width,
    diagonal,
    HAS_DIAGONAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IDS: tl.constexpr,
    GRADIENT: tl.constexpr,
    FLATTEN: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    # one visit, unless a few programs walk over all tiles: the compiler then fuses this loop with
    # the product's, and the next tile's loads begin before a tile's epilogue
    count = visits(rows, columns, BLOCK_R, BLOCK_S, FLATTEN)
    for visit in tl.range(0, count, flatten=FLATTEN):
        index = tl.program_id(0) + visit * tl.num_programs(0)
        tile_r, tile_s = tile_indices(index, rows, columns, BLOCK_R, BLOCK_S, GROUP)
        first_r, first_s = tile_r * BLOCK_R, tile_s * BLOCK_S
        scale = tl.load(scale_ptr)
        offset = 0.0
        if HAS_OFFSET:
            offset = tl.load(offset_ptr)
        p_row_sum = row_sum_ptr + tile_s.to(tl.int64) * rows
        p_scalars = scalars_ptr + 2 * index
        cos = cosines(
            x_ptr, y_ptr, stride_x, stride_y, rows, columns, width, first_r, first_s,
            BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
        )  # fmt: skip
        beyond = _parts(
            cos, scale, offset, weight_ptr, row_id_ptr, column_id_ptr, p_row_sum, g_ptr, p_scalars,
            stride_g, rows, columns, diagonal, first_r, first_s, False, HAS_DIAGONAL, IDS, GRADIENT,
            EMULATE, BLOCK_R, BLOCK_S, PARTS,
        )  # fmt: skip
        tl.store(beyond_ptr + index, tl.max(beyond, 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def sigmoid_entries_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    offset_ptr,
    weight_ptr,
    row_id_ptr,
    column_id_ptr,
    row_sum_ptr,
    g_ptr,
    scalars_ptr,
    beyond_ptr,
    stride_x,
    stride_y,
    stride_g,
    rows,
    columns,
    width,
    diagonal,
    programs,
    HAS_DIAGONAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IDS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles = any_raised(beyond_ptr, tl.cdiv(rows, BLOCK_R) * tl.cdiv(columns, BLOCK_S))
    scale = tl.load(scale_ptr)
    offset = 0.0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
    for index in range(tl.program_id(0), tiles, programs):
        if tl.load(beyond_ptr + index) > 0:
            tile_r, tile_s = tile_indices(index, rows, columns, BLOCK_R, BLOCK_S, GROUP)
            first_r, first_s = tile_r * BLOCK_R, tile_s * BLOCK_S
            cos = cosines(
                x_ptr, y_ptr, stride_x, stride_y, rows, columns, width, first_r, first_s,
                BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
            )  # fmt: skip
            _parts(
                cos, scale, offset, weight_ptr, row_id_ptr, column_id_ptr,
                row_sum_ptr + tile_s.to(tl.int64) * rows, g_ptr,
                scalars_ptr + 2 * index, stride_g, rows, columns, diagonal,
                first_r, first_s, True, HAS_DIAGONAL, IDS, GRADIENT, EMULATE,
                BLOCK_R, BLOCK_S, PARTS,
            )  # fmt: skip


def sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    diagonal: int | None,
    ids: tuple[Tensor, Tensor] | None,
    positive_ids: bool,
    weight: Tensor,
    out: Tensor | None,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums (R,); scale * G into `out` (R, S); the sums of G * cos and G, 0-d, if `out`.

    Entries whose `ids`, of rows and columns, agree are left out or positives. `out` lies in a
    buffer of `similarity.room_for`.
    """
    r, s = x.shape[0], y.shape[0]
    tiles_r, tiles_s = -(-r // tiling.rows), -(-s // tiling.columns)
    row_sum = x.new_empty((tiles_s, r), dtype=torch.float32)
    scalars = row_sum.new_empty((tiles_r * tiles_s if out is not None else 0, 2))
    beyond = x.new_empty(tiles_r * tiles_s, dtype=torch.int32)
    x_in, y_in = operands(x, y, tiling)
    arguments = (
        x_in,
        y_in,
        scale,
        scale if offset is None else offset,
        weight,
        *((scale, scale) if ids is None else ids),
        row_sum,
        row_sum if out is None else out,
        scalars,
        beyond,
        x.stride(0),
        y.stride(0),
        0 if out is None else out.stride(0),
        r,
        s,
        x.shape[1],
        diagonal or 0,
    )
    options = {
        "HAS_DIAGONAL": diagonal is not None,
        "HAS_OFFSET": offset is not None,
        "IDS": NO_IDS if ids is None else IDS_POSITIVE if positive_ids else IDS_LEFT_OUT,
        "GRADIENT": out is not None,
        **product_options(x_in, tiling),
    }
    programs, walk = programs_of(tiling, x.device, tiles_r * tiles_s)
    launch(sigmoid_kernel, programs, *arguments, FLATTEN=walk, **options)
    programs = persistent_programs(x.device, tiles_r * tiles_s)
    # one kernel for what the usual way has several for: fewer to compile; registers hold less of
    # its tile at a time
    options |= {"HAS_DIAGONAL": True, "EVEN_D": options["TMA"], "PARTS": ENTRIES_PARTS}
    given = arguments[-1] if diagonal is not None else NO_DIAGONAL
    launch(sigmoid_entries_kernel, programs, *arguments[:-1], given, programs, **options)
    dot, total = scalars.sum(dim=0)
    return row_sum.sum(dim=0), dot, total
