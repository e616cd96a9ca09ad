"""Log-sum-exps of a tile of S and their gradient, S never in memory.

    statistics   S = scale * X @ Y.T; per row and per column of a tile the maximum and the sum of
                 2^(S' - maximum), S' = S log2(e), over entries that are not left out
    gradient     S again; G_ij = a_i exp(S_ij - row_lse_i) + b_j exp(S_ij - column_lse_j), times
                 the scale, rounded once; float32 sums of G * cos and G

X (R, D), Y (S, D); partial statistics are (tiles, lines), for `merge.py`, so that no program
writes where another does: no atomics, no locks, bitwise reproducible. The gradient
forms S again because storing it exactly would cost more traffic than the product.

A tile's entries serve rows and columns; where its logits (the gradient: the log-sum-exps of its
lines) span less than 96 powers of two, one exponential serves both. With biases, which the flagged
tiles alone may have (`flagged.py`), an entry has a logit for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import Tiling, launch, operands, product_options
from fastclip.kernels.tile import (
    LEFT_OUT,
    LOG2E,
    NO_DIAGONAL,
    cosines,
    finite,
    leave_out,
    parts_of,
    rounded,
    tile_indices,
)

# arguments whose values must not make a kernel of their own: batch sizes differ, and a vector may
# begin anywhere
NUMBERS = ["rows", "columns", "diagonal"]
VECTORS = [
    *("scale_ptr", "offset_ptr", "row_id_ptr", "column_id_ptr", "row_lse_ptr", "row_weight_ptr"),
    *("column_lse_ptr", "column_weight_ptr", "row_max_ptr", "row_sum_ptr", "row_dot_ptr"),
    *("column_max_ptr", "column_sum_ptr", "dot_ptr", "sum_ptr"),
    *("row_bias_ptr", "column_bias_ptr", "by_row_ptr", "by_column_ptr"),
]

# powers of two: float32 spans 126, and 24 of them hold the terms that still count
SPAN = tl.constexpr(96.0)
LARGEST_SIDE = 256


@triton.jit
def own_statistics(
    cos,
    scale,
    row_id_ptr,
    column_id_ptr,
    row_bias_ptr,
    column_bias_ptr,
    row_max_ptr,
    row_sum_ptr,
    row_dot_ptr,
    column_max_ptr,
    column_sum_ptr,
    e_ptr,
    stride_e,
    rows,
    columns,
    diagonal,
    tile_r,
    tile_s,
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store a tile's partial statistics, relative to its own maxima."""
    first_r, first_s = tile_r * BLOCK_R, tile_s * BLOCK_S
    i_r = first_r + tl.arange(0, BLOCK_R)
    i_s = first_s + tl.arange(0, BLOCK_S)
    logits = leave_out(
        cos * scale, row_id_ptr, column_id_ptr, rows, columns, diagonal, i_r, i_s, first_r, first_s,
        HAS_DIAGONAL, HAS_IDS, float("-inf"), BLOCK_R, BLOCK_S,
    )  # fmt: skip
    p_r = tile_s.to(tl.int64) * rows + i_r
    m_r = i_r < rows
    of_columns = logits
    if HAS_ROW_BIAS:
        row_bias = tl.load(row_bias_ptr + i_r, mask=m_r, other=0.0)
        of_columns = logits + (row_bias * LOG2E)[:, None]
    if HAS_COLUMN_BIAS:
        column_bias = tl.load(column_bias_ptr + i_s, mask=i_s < columns, other=0.0)
        logits += (column_bias * LOG2E)[None, :]
    row_max = tl.max(logits, 1)
    if COLUMNS:
        column_max = tl.max(of_columns, 0)
        top = tl.max(row_max, 0)
        low_r = tl.min(tl.where(row_max == float("-inf"), top, row_max), 0)
        low_s = tl.min(tl.where(column_max == float("-inf"), top, column_max), 0)
        if HAS_ROW_BIAS or HAS_COLUMN_BIAS:
            low_r = float("-inf")
        # NaN, and a tile that is left out whole, take the second way
        if top - tl.minimum(low_r, low_s) < SPAN:
            e = tl.exp2(logits - top)
            row_sum = tl.sum(e, 1) * tl.exp2(tl.minimum(top - row_max, SPAN))
            column_sum = tl.sum(e, 0) * tl.exp2(tl.minimum(top - column_max, SPAN))
        else:
            row_sum = tl.sum(tl.exp2(logits - finite(row_max)[:, None]), 1)
            column_sum = tl.sum(tl.exp2(of_columns - finite(column_max)[None, :]), 0)
        p_s = tile_r.to(tl.int64) * columns + i_s
        m_s = i_s < columns
        tl.store(column_max_ptr + p_s, column_max, mask=m_s)
        tl.store(column_sum_ptr + p_s, column_sum, mask=m_s)
    else:
        e = tl.exp2(logits - finite(row_max)[:, None])
        row_sum = tl.sum(e, 1)
        if KEEP:
            # from the logits: a tile of cosines beside them would not fit the registers
            dot = tl.sum(tl.where(logits == float("-inf"), 0.0, e * logits), 1) / scale
            tl.store(row_dot_ptr + p_r, dot, mask=m_r)
            o_e = tl.arange(0, BLOCK_R)[:, None] * stride_e + tl.arange(0, BLOCK_S)[None, :]
            p_e = e_ptr + first_r.to(tl.int64) * stride_e + first_s + o_e
            tl.store(p_e, rounded(e, e_ptr, EMULATE))
    tl.store(row_max_ptr + p_r, row_max, mask=m_r)
    tl.store(row_sum_ptr + p_r, row_sum, mask=m_r)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def statistics_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_id_ptr,
    column_id_ptr,
    row_max_ptr,
    row_sum_ptr,
    row_dot_ptr,
    column_max_ptr,
    column_sum_ptr,
    e_ptr,
    stride_x,
    stride_y,
    stride_e,
    rows,
    columns,
    width,
    diagonal,
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
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
    tile_r, tile_s = tile_indices(tl.program_id(0), rows, columns, BLOCK_R, BLOCK_S, GROUP)
    cos = cosines(
        x_ptr, y_ptr, stride_x, stride_y, rows, columns, width, tile_r * BLOCK_R, tile_s * BLOCK_S,
        BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
    )  # fmt: skip
    scale = tl.load(scale_ptr) * LOG2E
    parts = parts_of(cos, PARTS)
    for part in tl.static_range(PARTS):
        own_statistics(
            parts[part], scale, row_id_ptr, column_id_ptr, scale_ptr, scale_ptr, row_max_ptr,
            row_sum_ptr, row_dot_ptr, column_max_ptr, column_sum_ptr, e_ptr, stride_e, rows,
            columns, diagonal, tile_r, tile_s * PARTS + part, HAS_DIAGONAL, HAS_IDS, False, False,
            COLUMNS, KEEP, EMULATE, BLOCK_R, BLOCK_S // PARTS,
        )  # fmt: skip


@triton.jit
def _emit(
    g,
    logits,
    scale,
    p_g,
    p_dot,
    p_sum,
    HAS_OFFSET: tl.constexpr,
    SCALARS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # called in each branch, so that no tile has to pass out of one
    if SCALARS:
        dot = tl.sum(tl.sum(g * logits, 1), 0)
        tl.store(p_dot, dot / (scale * LOG2E))
        if HAS_OFFSET:
            tl.store(p_sum, tl.sum(tl.sum(g, 1), 0))
    tl.store(p_g, rounded(g * scale, p_g, EMULATE))


@triton.jit
def own_gradient(
    cos,
    scale,
    offset_ptr,
    row_id_ptr,
    column_id_ptr,
    row_bias_ptr,
    column_bias_ptr,
    row_lse_ptr,
    row_weight_ptr,
    column_lse_ptr,
    column_weight_ptr,
    g_ptr,
    p_dot,
    p_sum,
    by_row_ptr,
    by_column_ptr,
    stride_g,
    rows,
    columns,
    diagonal,
    tile_r,
    tile_s,
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALARS: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store a tile's G, relative to its lines' log-sum-exps, and its scalar sums."""
    first_r, first_s = tile_r * BLOCK_R, tile_s * BLOCK_S
    i_r = first_r + tl.arange(0, BLOCK_R)
    i_s = first_s + tl.arange(0, BLOCK_S)
    # the one tile that stays in registers; cosines are recovered from it
    logits = leave_out(
        cos * (scale * LOG2E), row_id_ptr, column_id_ptr, rows, columns, diagonal,
        i_r, i_s, first_r, first_s, HAS_DIAGONAL, HAS_IDS, LEFT_OUT, BLOCK_R, BLOCK_S,
    )  # fmt: skip

    offset = 0.0
    if HAS_OFFSET:
        # into the anchors: logits carry no offset
        offset = tl.load(offset_ptr)
    m_r, m_s = i_r < rows, i_s < columns
    anchor_r = tl.load(row_lse_ptr + i_r, mask=m_r, other=float("inf"))
    anchor_r = (finite(anchor_r) - offset) * LOG2E
    weight_r = tl.load(row_weight_ptr + i_r, mask=m_r, other=0.0)
    o_g = tl.arange(0, BLOCK_R)[:, None] * stride_g + tl.arange(0, BLOCK_S)[None, :]
    p_g = g_ptr + first_r.to(tl.int64) * stride_g + first_s + o_g
    if HAS_ROW_BIAS or HAS_COLUMN_BIAS:
        below = -anchor_r[:, None]
        if HAS_COLUMN_BIAS:
            column_bias = tl.load(column_bias_ptr + i_s, mask=m_s, other=0.0)
            below = (column_bias * LOG2E)[None, :] + below
        g = tl.exp2(logits + below) * weight_r[:, None]
        if HAS_COLUMN_BIAS:
            p_s = tile_r.to(tl.int64) * columns + i_s
            tl.store(by_column_ptr + p_s, tl.sum(g, 0), mask=m_s)
        if COLUMNS:
            anchor_s = tl.load(column_lse_ptr + i_s, mask=m_s, other=float("inf"))
            below = -((finite(anchor_s) - offset) * LOG2E)[None, :]
            if HAS_ROW_BIAS:
                row_bias = tl.load(row_bias_ptr + i_r, mask=m_r, other=0.0)
                below = (row_bias * LOG2E)[:, None] + below
            weight_s = tl.load(column_weight_ptr + i_s, mask=m_s, other=0.0)
            of_columns = tl.exp2(logits + below) * weight_s[None, :]
            if HAS_ROW_BIAS:
                p_r = tile_s.to(tl.int64) * rows + i_r
                tl.store(by_row_ptr + p_r, tl.sum(of_columns, 1), mask=m_r)
            g += of_columns
        _emit(g, logits, scale, p_g, p_dot, p_sum, HAS_OFFSET, SCALARS, EMULATE)
    elif COLUMNS:
        anchor_s = tl.load(column_lse_ptr + i_s, mask=m_s, other=float("inf"))
        anchor_s = (finite(anchor_s) - offset) * LOG2E
        weight_s = tl.load(column_weight_ptr + i_s, mask=m_s, other=0.0)
        low = tl.minimum(tl.min(anchor_r, 0), tl.min(anchor_s, 0))
        high_r = tl.max(tl.where(m_r, anchor_r, low), 0)
        high = tl.maximum(high_r, tl.max(tl.where(m_s, anchor_s, low), 0))
        # no logit lies above its lines' log-sum-exps, so none is far above the lowest
        if high - low < SPAN:
            u = weight_r * tl.exp2(low - anchor_r)
            v = weight_s * tl.exp2(low - anchor_s)
            g = tl.exp2(logits - low) * (u[:, None] + v[None, :])
            _emit(g, logits, scale, p_g, p_dot, p_sum, HAS_OFFSET, SCALARS, EMULATE)
        else:
            g = tl.exp2(logits - anchor_r[:, None]) * weight_r[:, None]
            g += tl.exp2(logits - anchor_s[None, :]) * weight_s[None, :]
            _emit(g, logits, scale, p_g, p_dot, p_sum, HAS_OFFSET, SCALARS, EMULATE)
    else:
        g = tl.exp2(logits - anchor_r[:, None]) * weight_r[:, None]
        _emit(g, logits, scale, p_g, p_dot, p_sum, HAS_OFFSET, SCALARS, EMULATE)


def room_for(rows: int, columns: int) -> tuple[int, int]:
    """Shape of a buffer in which tiles of (rows, columns) are stored whole, without a mask.

    Lines start aligned, whatever the number of columns; a masked store would be element by
    element where that is odd.
    """
    return -(-rows // LARGEST_SIDE) * LARGEST_SIDE, -(-columns // 16) * 16 + LARGEST_SIDE


def statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    diagonal: int | None,
    columns: bool,
    kept: Tensor | None,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partial statistics: row max and sum (column tiles' parts, R), column max and sum, row dots.

    The columns' are (row tiles, S) or, without `columns`, empty. `kept` (R, S) in a buffer of
    `room_for`, only without `columns`, takes E; the row dots are then the rows' sums of E * cos.
    """
    r, s = x.shape[0], y.shape[0]
    tiles_r, tiles_s = -(-r // tiling.rows), -(-s // tiling.columns)
    row_max, row_sum = x.new_empty((2, tiles_s * tiling.parts, r), dtype=torch.float32)
    column_lines = (2, tiles_r, s) if columns else (2, 0, 0)
    column_max, column_sum = x.new_empty(column_lines, dtype=torch.float32)
    row_dot = row_max.new_empty((tiles_s * tiling.parts, r) if kept is not None else (0, 0))
    row_id, column_id = (x, x) if ids is None else ids
    x_in, y_in = operands(x, y, tiling)
    launch(
        statistics_kernel,
        tiles_r * tiles_s,
        x_in,
        y_in,
        scale,
        row_id,
        column_id,
        row_max,
        row_sum,
        row_dot,
        column_max,
        column_sum,
        row_max if kept is None else kept,
        x.stride(0),
        y.stride(0),
        0 if kept is None else kept.stride(0),
        r,
        s,
        x.shape[1],
        NO_DIAGONAL if diagonal is None else diagonal,
        # always: a kernel less to compile
        HAS_DIAGONAL=True,
        HAS_IDS=ids is not None,
        COLUMNS=columns,
        KEEP=kept is not None,
        **product_options(x_in, tiling),
    )
    return row_max, row_sum, column_max, column_sum, row_dot
