"""The sigmoid loss of a tile of S = scale * X @ Y.T + offset and its gradient, S never in memory.

    row sums of softplus(S);   G_ij = weight_i sigmoid(S_ij), times the scale, rounded once

over entries that are not left out; float32 sums of G * cos and G. X (R, D), Y (S, D). Partial
sums are (column tiles, R) and (tiles,): no atomics, bitwise reproducible.

One exponential e = exp(-|S|) serves both. log(1 + e) is e times a polynomial: near the usual
start, S = -10, forming 1 + e would lose all but ten bits of e.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import Tiling, launch, operands, product_options
from fastclip.kernels.tile import (
    LEFT_OUT,
    LOG2E,
    cosines,
    leave_out,
    parts_of,
    rounded,
    tile_indices,
)

NUMBERS = ["rows", "columns", "diagonal"]
VECTORS = ["scale_ptr", "offset_ptr", "weight_ptr", "row_sum_ptr", "dot_ptr", "sum_ptr"]


@triton.jit
def _log1p(e):
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
def _sigmoid(
    cos,
    scale,
    offset,
    weight_ptr,
    row_sum_ptr,
    g_ptr,
    p_dot,
    p_sum,
    stride_g,
    rows,
    columns,
    diagonal,
    tile_r,
    tile_s,
    HAS_DIAGONAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    first_r, first_s = tile_r * BLOCK_R, tile_s * BLOCK_S
    i_r = first_r + tl.arange(0, BLOCK_R)
    i_s = first_s + tl.arange(0, BLOCK_S)
    # without offset, so that cosines can be recovered: the one tile that stays in registers
    logits = leave_out(
        cos * scale, weight_ptr, weight_ptr, rows, columns, diagonal, i_r, i_s, first_r, first_s,
        HAS_DIAGONAL, False, LEFT_OUT, BLOCK_R, BLOCK_S,
    )  # fmt: skip
    z = logits + offset
    e = tl.exp2(-tl.abs(z) * LOG2E)
    m_r = i_r < rows
    row_sum = tl.sum(tl.maximum(z, 0.0) + _log1p(e), 1)
    tl.store(row_sum_ptr + tile_s.to(tl.int64) * rows + i_r, row_sum, mask=m_r)
    if GRADIENT:
        weight = tl.load(weight_ptr + i_r, mask=m_r, other=0.0)
        g = tl.where(z >= 0.0, 1.0, e) / (1.0 + e) * weight[:, None]
        o_g = tl.arange(0, BLOCK_R)[:, None] * stride_g + tl.arange(0, BLOCK_S)[None, :]
        p_g = g_ptr + first_r.to(tl.int64) * stride_g + first_s + o_g
        tl.store(p_g, rounded(g * scale, p_g, EMULATE))
        dot = tl.sum(tl.sum(g * logits, 1), 0)
        tl.store(p_dot, dot / scale)
        tl.store(p_sum, tl.sum(tl.sum(g, 1), 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def sigmoid_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    offset_ptr,
    weight_ptr,
    row_sum_ptr,
    g_ptr,
    dot_ptr,
    sum_ptr,
    stride_x,
    stride_y,
    stride_g,
    rows,
    columns,
    width,
    diagonal,
    HAS_DIAGONAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
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
    tile_r, tile_s = tile_indices(rows, columns, BLOCK_R, BLOCK_S, GROUP)
    cos = cosines(
        x_ptr, y_ptr, stride_x, stride_y, rows, columns, width, tile_r * BLOCK_R, tile_s * BLOCK_S,
        BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    offset = 0.0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
    parts = parts_of(cos, PARTS)
    for part in tl.static_range(PARTS):
        partial = tl.program_id(0) * PARTS + part
        _sigmoid(
            parts[part], scale, offset, weight_ptr, row_sum_ptr, g_ptr, dot_ptr + partial,
            sum_ptr + partial, stride_g, rows, columns, diagonal, tile_r, tile_s * PARTS + part,
            HAS_DIAGONAL, GRADIENT, EMULATE, BLOCK_R, BLOCK_S // PARTS,
        )  # fmt: skip


def sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    diagonal: int | None,
    weight: Tensor,
    out: Tensor | None,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums (R,); scale * G into `out` (R, S); the sums of G * cos and G, 0-d, if `out`.

    `out` lies in a buffer of `similarity.room_for`.
    """
    r, s = x.shape[0], y.shape[0]
    tiles_r, tiles_s = triton.cdiv(r, tiling.rows), triton.cdiv(s, tiling.columns)
    row_sum = x.new_empty((tiles_s * tiling.parts, r), dtype=torch.float32)
    partial = tiles_r * tiles_s * tiling.parts
    dots, sums = row_sum.new_empty((2, partial if out is not None else 0))
    x_in, y_in = operands(x, y, tiling)
    launch(
        sigmoid_kernel,
        tiles_r * tiles_s,
        x_in,
        y_in,
        scale,
        scale if offset is None else offset,
        weight,
        row_sum,
        row_sum if out is None else out,
        dots,
        sums,
        x.stride(0),
        y.stride(0),
        0 if out is None else out.stride(0),
        r,
        s,
        x.shape[1],
        diagonal or 0,
        HAS_DIAGONAL=diagonal is not None,
        HAS_OFFSET=offset is not None,
        GRADIENT=out is not None,
        **product_options(x_in, tiling),
    )
    return row_sum.sum(dim=0), dots.sum(), sums.sum()
