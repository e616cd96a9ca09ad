"""What follows `statistics`: partial statistics of all tiles of a line merged, and E made into G.

    merge      maxima and sums (tiles, lines) of powers of two, into running natural ones (lines,)
    rescale    E = 2^(S' - row maximum of the tile), kept by `statistics`, times what makes it G

Tiles are merged in a fixed order. E and G may share their memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import INTERPRETED, Tiling, launch
from fastclip.kernels.tile import LN2, LOG2E, finite, rounded

MERGED_TILES, MERGED_LINES = 16, 32
RESCALED_ROWS = 16

NUMBERS = ["rows", "columns", "tiles", "lines"]
VECTORS = [
    *("part_max_ptr", "part_sum_ptr", "part_dot_ptr", "run_max_ptr", "run_sum_ptr", "run_dot_ptr"),
    *("offset_ptr", "max_ptr", "factor_ptr"),
]


@triton.jit
def merge_lines(
    part_max_ptr,
    part_sum_ptr,
    part_dot_ptr,
    run_max_ptr,
    run_sum_ptr,
    run_dot_ptr,
    offset,
    tiles,
    lines,
    i,
    mask,
    HAS_DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Merge the tiles of lines i where `mask` holds."""
    run_max = tl.load(run_max_ptr + i, mask=mask, other=float("-inf"))
    run_sum = tl.load(run_sum_ptr + i, mask=mask, other=0.0)
    run_dot = tl.zeros((BLOCK_L,), dtype=tl.float32)
    o_t = tl.arange(0, BLOCK_T)
    p = o_t.to(tl.int64)[:, None] * lines + i[None, :]
    # several tiles at a time: one after the other would wait for memory at each
    for start in range(0, tiles, BLOCK_T):
        m = (o_t < tiles - start)[:, None] & mask[None, :]
        part_max = tl.load(part_max_ptr + p, mask=m, other=float("-inf")) * LN2 + offset
        part_sum = tl.load(part_sum_ptr + p, mask=m, other=0.0)
        merged = tl.maximum(run_max, tl.max(part_max, 0))
        anchor = finite(merged)
        keep = tl.exp2((run_max - anchor) * LOG2E)
        add = tl.exp2((part_max - anchor[None, :]) * LOG2E)
        run_sum = run_sum * keep + tl.sum(part_sum * add, 0)
        if HAS_DOT:
            part_dot = tl.load(part_dot_ptr + p, mask=m, other=0.0)
            run_dot = run_dot * keep + tl.sum(part_dot * add, 0)
        run_max = merged
        p += BLOCK_T * lines
    tl.store(run_max_ptr + i, run_max, mask=mask)
    tl.store(run_sum_ptr + i, run_sum, mask=mask)
    if HAS_DOT:
        tl.store(run_dot_ptr + i, run_dot, mask=mask)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def merge_kernel(
    part_max_ptr,
    part_sum_ptr,
    part_dot_ptr,
    run_max_ptr,
    run_sum_ptr,
    run_dot_ptr,
    offset_ptr,
    tiles,
    lines,
    HAS_OFFSET: tl.constexpr,
    HAS_DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    offset = 0.0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
    merge_lines(
        part_max_ptr, part_sum_ptr, part_dot_ptr, run_max_ptr, run_sum_ptr, run_dot_ptr, offset,
        tiles, lines, i, i < lines, HAS_DOT, BLOCK_T, BLOCK_L,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def rescale_kernel(
    e_ptr,
    g_ptr,
    part_max_ptr,
    max_ptr,
    factor_ptr,
    stride_e,
    rows,
    columns,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # some rows of one of `statistics`' column tiles; e_ptr and g_ptr may be the same memory
    tiles = tl.cdiv(columns, BLOCK_S)
    pid = tl.program_id(0)
    first_r, tile = (pid // tiles) * BLOCK_R, pid % tiles
    i_r = first_r + tl.arange(0, BLOCK_R)
    m_r = i_r < rows
    own = tl.load(part_max_ptr + tile.to(tl.int64) * rows + i_r, mask=m_r, other=float("-inf"))
    top = tl.load(max_ptr + i_r, mask=m_r, other=0.0)
    share = tl.exp2((own * LN2 - finite(top)) * LOG2E)
    factor = tl.load(factor_ptr + i_r, mask=m_r, other=0.0) * share
    offset = tl.arange(0, BLOCK_R)[:, None] * stride_e + tl.arange(0, BLOCK_S)[None, :]
    corner = first_r.to(tl.int64) * stride_e + tile * BLOCK_S
    e = tl.load(e_ptr + corner + offset)
    # every element is read before any is overwritten in the other format
    tl.debug_barrier()
    tl.store(g_ptr + corner + offset, rounded(e.to(tl.float32) * factor[:, None], g_ptr, EMULATE))


def merge(
    part_max: Tensor,
    part_sum: Tensor,
    part_dot: Tensor | None,
    run_max: Tensor,
    run_sum: Tensor,
    offset: Tensor | None,
) -> Tensor:
    """Merge partial statistics (tiles, lines) into running ones (lines,), in place.

    Returns the sums of `part_dot` relative to the new maximum, or an empty tensor without it.
    """
    tiles, lines = part_max.shape
    dot = run_max.new_empty(lines if part_dot is not None else 0)
    launch(
        merge_kernel,
        -(-lines // MERGED_LINES),
        part_max,
        part_sum,
        part_max if part_dot is None else part_dot,
        run_max,
        run_sum,
        dot,
        run_max if offset is None else offset,
        tiles,
        lines,
        HAS_OFFSET=offset is not None,
        HAS_DOT=part_dot is not None,
        BLOCK_T=MERGED_TILES,
        BLOCK_L=MERGED_LINES,
    )
    return dot


def rescale(
    kept: Tensor, out: Tensor, part_max: Tensor, row_max: Tensor, factor: Tensor, tiling: Tiling
) -> None:
    """out = factor * exp(S - row_max) from what `statistics` kept; `out` may be its memory."""
    r, s = kept.shape
    columns = tiling.columns // tiling.parts
    launch(
        rescale_kernel,
        -(-r // RESCALED_ROWS) * -(-s // columns),
        kept,
        out,
        part_max,
        row_max,
        factor,
        kept.stride(0),
        r,
        s,
        EMULATE=INTERPRETED,
        BLOCK_R=RESCALED_ROWS,
        BLOCK_S=columns,
    )
