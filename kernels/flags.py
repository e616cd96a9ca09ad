"""Which lines of a tile the common anchor does not serve, and what it makes of the others.

    totals    sums of E of all tiles of a line, merged into running statistics; a line whose total
              fails `2^-80 <= total < 2^127` is flagged and left for `flagged.py`
    factors   u_i = scale * weight_i * 2^(c - lse_i), and likewise of columns, padded to whole
              tiles; a block of lines is flagged if one of them has no such factor

A test that NaN, infinity and 0 fail. Flags stay on the device, so that bits depend on data alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import Tiling, launch
from fastclip.kernels.lean import LeanStatistics, Logits, anchor_without_offset
from fastclip.kernels.merge import MERGED_LINES, MERGED_TILES
from fastclip.kernels.tile import LN2, LOG2E, finite

NUMBERS = ["rows", "columns", "row_tiles", "column_tiles"]
VECTORS = [
    *("scale_ptr", "offset_ptr", "flag_ptr", "raised_ptr", "row_lse_ptr"),
    *("row_weight_ptr", "column_lse_ptr", "column_weight_ptr", "row_part_ptr", "column_part_ptr"),
    *("row_part_max_ptr", "column_part_max_ptr", "row_max_ptr", "row_sum_ptr"),
    *("column_max_ptr", "column_sum_ptr", "row_bias_ptr", "column_bias_ptr", "spread_ptr"),
]

# powers of two
LEAST_SUM, LARGEST_SUM = tl.constexpr(-80.0), tl.constexpr(127.0)
# a factor is a normal number, and its sum with another one too
LEAST_FACTOR, LARGEST_FACTOR = tl.constexpr(2.0**-126), tl.constexpr(2.0**110)


@triton.jit
def _totals(
    part_ptr,
    part_max_ptr,
    run_max_ptr,
    run_sum_ptr,
    flag_ptr,
    raised_ptr,
    bias_ptr,
    anchor,
    offset,
    tiles,
    lines,
    first,
    HAS_BIAS: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i = first + tl.arange(0, BLOCK_L)
    mask = i < lines
    total = tl.zeros((BLOCK_L,), dtype=tl.float32)
    top = tl.full((BLOCK_L,), float("-inf") if MAXIMA else 0.0, dtype=tl.float32)
    o_t = tl.arange(0, BLOCK_T)
    p = o_t.to(tl.int64)[:, None] * lines + i[None, :]
    for start in range(0, tiles, BLOCK_T):
        m = (o_t < tiles - start)[:, None] & mask[None, :]
        total += tl.sum(tl.load(part_ptr + p, mask=m, other=0.0), 0)
        if MAXIMA:
            part_max = tl.load(part_max_ptr + p, mask=m, other=float("-inf"))
            top = tl.maximum(top, tl.max(part_max, 0))
        p += BLOCK_T * lines
    ok = (total >= tl.exp2(LEAST_SUM)) & (total < tl.exp2(LARGEST_SUM))
    flag = (mask & (ok == 0)).to(tl.int32)
    tl.store(flag_ptr + i, flag, mask=mask)
    if tl.max(flag, 0) > 0:
        # by whichever program: all store the same
        tl.store(raised_ptr, 1)

    run_max = tl.load(run_max_ptr + i, mask=mask, other=float("-inf"))
    run_sum = tl.load(run_sum_ptr + i, mask=mask, other=0.0)
    if HAS_BIAS:
        # E has the line's own in it
        offset -= finite(tl.load(bias_ptr + i, mask=mask, other=0.0))
    largest = (top + anchor) * LN2 + offset
    merged = tl.maximum(run_max, largest)
    below = finite(merged)
    total *= tl.exp2((largest - below) * LOG2E)
    if MAXIMA:
        # in two steps: neither is flushed to 0
        total = total * tl.exp2(-0.5 * top) * tl.exp2(-0.5 * top)
    run_sum = run_sum * tl.exp2((run_max - below) * LOG2E) + total
    tl.store(run_max_ptr + i, merged, mask=mask & ok)
    tl.store(run_sum_ptr + i, run_sum, mask=mask & ok)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def totals_kernel(
    row_part_ptr,
    row_part_max_ptr,
    row_max_ptr,
    row_sum_ptr,
    column_part_ptr,
    column_part_max_ptr,
    column_max_ptr,
    column_sum_ptr,
    scale_ptr,
    offset_ptr,
    row_bias_ptr,
    column_bias_ptr,
    spread_ptr,
    flag_ptr,
    raised_ptr,
    row_tiles,
    column_tiles,
    rows,
    columns,
    HAS_OFFSET: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    anchor = anchor_without_offset(scale_ptr, spread_ptr, HAS_ROW_BIAS or HAS_COLUMN_BIAS)
    offset = 0.0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
    pid = tl.program_id(0)
    of_rows = tl.cdiv(rows, BLOCK_L)
    if pid < of_rows:
        _totals(
            row_part_ptr, row_part_max_ptr, row_max_ptr, row_sum_ptr, flag_ptr, raised_ptr,
            row_bias_ptr, anchor, offset, column_tiles, rows, pid * BLOCK_L,
            HAS_ROW_BIAS, MAXIMA, BLOCK_T, BLOCK_L,
        )  # fmt: skip
    else:
        _totals(
            column_part_ptr, column_part_max_ptr, column_max_ptr, column_sum_ptr, flag_ptr + rows,
            raised_ptr, column_bias_ptr, anchor, offset, row_tiles, columns,
            (pid - of_rows) * BLOCK_L, HAS_COLUMN_BIAS, MAXIMA, BLOCK_T, BLOCK_L,
        )  # fmt: skip


@triton.jit
def _factors(
    lse_ptr,
    weight_ptr,
    factor_ptr,
    raised_ptr,
    bias_ptr,
    scale,
    anchor,
    offset,
    first,
    lines,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = first + tl.arange(0, BLOCK)
    mask = i < lines
    lse = tl.load(lse_ptr + i, mask=mask, other=float("-inf"))
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0)
    # nothing but entries that are left out, or padding
    empty = lse == float("-inf")
    if HAS_BIAS:
        # E has the line's own in it
        offset -= finite(tl.load(bias_ptr + i, mask=mask, other=0.0))
    total = (lse - offset) * LOG2E - anchor
    unscaled = weight * tl.exp2(-total)
    factor = unscaled * scale
    size, unscaled = tl.abs(factor), tl.abs(unscaled)
    ok = (size >= LEAST_FACTOR) & (size <= LARGEST_FACTOR) & (unscaled >= LEAST_FACTOR)
    ok = (ok | (weight == 0.0)) & (total >= LEAST_SUM) & (total < LARGEST_SUM)
    ok = ok | (empty & (weight == weight))
    tl.store(factor_ptr + i, tl.where(ok & (empty == 0), factor, 0.0))
    tl.store(raised_ptr, tl.max((ok == 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def factors_kernel(
    row_lse_ptr,
    row_weight_ptr,
    column_lse_ptr,
    column_weight_ptr,
    scale_ptr,
    offset_ptr,
    row_bias_ptr,
    column_bias_ptr,
    spread_ptr,
    u_ptr,
    v_ptr,
    raised_ptr,
    rows,
    columns,
    HAS_OFFSET: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    anchor = anchor_without_offset(scale_ptr, spread_ptr, HAS_ROW_BIAS or HAS_COLUMN_BIAS)
    scale = tl.load(scale_ptr)
    offset = 0.0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
    pid = tl.program_id(0)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    if pid < tiles_r:
        _factors(
            row_lse_ptr, row_weight_ptr, u_ptr, raised_ptr + pid, row_bias_ptr, scale, anchor,
            offset, pid * BLOCK_R, rows, HAS_ROW_BIAS, BLOCK_R,
        )  # fmt: skip
    else:
        _factors(
            column_lse_ptr, column_weight_ptr, v_ptr, raised_ptr + pid, column_bias_ptr, scale,
            anchor, offset, (pid - tiles_r) * BLOCK_S, columns, HAS_COLUMN_BIAS, BLOCK_S,
        )  # fmt: skip


def totals(
    logits: Logits,
    found: LeanStatistics,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Merge what `lean.statistics` found into running (maximum, sum) of rows and columns, in place.

    Flagged lines are left as they are; (R + S,) int32 says which, rows first. Without maxima a
    line's running maximum is its anchor, in natural logarithms.
    """
    r = rows[0].shape[0]
    s = 0 if columns is None else columns[0].shape[0]
    flags = found.raised.new_empty(r + s)
    maxima = found.row_max.numel() > 0
    of_columns = rows if columns is None else columns
    launch(
        totals_kernel,
        -(-r // MERGED_LINES) + -(-s // MERGED_LINES),
        found.row_sum,
        found.row_max,
        *rows,
        found.column_sum,
        found.column_max,
        *of_columns,
        *logits.scalars(),
        *logits.lines(),
        logits.spread(),
        flags,
        found.raised,
        found.column_sum.shape[0],
        found.row_sum.shape[0],
        r,
        s,
        HAS_OFFSET=logits.offset is not None,
        **logits.biased(),
        MAXIMA=maxima,
        BLOCK_T=MERGED_TILES,
        BLOCK_L=MERGED_LINES,
    )
    return flags


def factors(
    logits: Logits,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | None,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of rows and columns, from their (lse, weight), and flags of their blocks, int32."""
    r = rows[0].shape[0]
    s = 0 if columns is None else columns[0].shape[0]
    tiles_r, tiles_s = -(-r // tiling.rows), -(-s // tiling.columns)
    sizes = tiles_r * tiling.rows, tiles_s * tiling.columns
    # one allocation; the columns' begin aligned
    u, v = rows[0].new_empty(sum(sizes)).split(sizes)
    raised = rows[0].new_empty(tiles_r + tiles_s, dtype=torch.int32)
    launch(
        factors_kernel,
        tiles_r + tiles_s,
        *rows,
        *(rows if columns is None else columns),
        *logits.scalars(),
        *logits.lines(),
        logits.spread(),
        u,
        v,
        raised,
        r,
        s,
        HAS_OFFSET=logits.offset is not None,
        **logits.biased(),
        BLOCK_R=tiling.rows,
        BLOCK_S=tiling.columns,
    )
    return u, v, raised
