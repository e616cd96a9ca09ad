"""The gradient of a tile from the exponentials that its statistics kept: no product.

    G_ij = E_ij * (u_i + v_j), rounded once, where the factors have the scale in them; sums of G

E is that of `lean.py`, rounded to G's type; u and v are those of `flags.py`. What a bias of -inf
leaves out has no share of G; with biases the shares are summed by themselves. Tiles with a flagged
line are left for `flagged.py`, which forms S again.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import INTERPRETED, Tiling, launch
from fastclip.kernels.lean import Logits
from fastclip.kernels.tile import biases, rounded, tile_indices

NUMBERS = ["rows", "columns"]
VECTORS = [
    *("scale_ptr", "raised_ptr", "sum_ptr"),
    *("row_bias_ptr", "column_bias_ptr", "by_row_ptr", "by_column_ptr"),
]
# rows that are worked on at a time: registers hold those of one step and, with biases, as many sums
STEP, BIASED_STEP = 16, 8


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def weigh_kernel(
    e_ptr,
    g_ptr,
    u_ptr,
    v_ptr,
    raised_ptr,
    scale_ptr,
    row_bias_ptr,
    column_bias_ptr,
    sum_ptr,
    by_row_ptr,
    by_column_ptr,
    stride_e,
    stride_g,
    rows,
    columns,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOTAL: tl.constexpr,
    SLOTS: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
):
    tile_r, tile_s = tile_indices(tl.program_id(0), rows, columns, BLOCK_R, BLOCK_S, GROUP)
    raised = tl.load(raised_ptr + tile_r)
    if COLUMNS:
        raised += tl.load(raised_ptr + tl.cdiv(rows, BLOCK_R) + tile_s)
    if raised == 0:
        first_s = tile_s * BLOCK_S
        i_s = first_s + tl.arange(0, BLOCK_S)
        total = tl.zeros((STEP,), dtype=tl.float32)
        if HAS_COLUMN_BIAS:
            _, counts_s = biases(column_bias_ptr, i_s, i_s < columns)
            # over rows a step apart: warps then add up once a tile, not once a step
            by_column = tl.zeros((STEP, BLOCK_S), dtype=tl.float32)
        for step in tl.static_range(BLOCK_R // STEP):
            first_r = tile_r * BLOCK_R + step * STEP
            i_r = first_r + tl.arange(0, STEP)
            o_r, o_s = tl.arange(0, STEP)[:, None], tl.arange(0, BLOCK_S)[None, :]
            p_e = e_ptr + first_r.to(tl.int64) * stride_e + first_s + (o_r * stride_e + o_s)
            e = tl.load(p_e).to(tl.float32)
            # behind the last column is the next tile of the chunk, or nothing
            inside = (i_r < rows)[:, None] & (i_s < columns)[None, :]
            # factors are padded to whole tiles, with 0
            factor = tl.load(u_ptr + i_r)[:, None]
            if HAS_ROW_BIAS or HAS_COLUMN_BIAS:
                e = tl.where(inside, e, 0.0)
                g = e * factor
                if HAS_COLUMN_BIAS:
                    g = tl.where(counts_s[None, :], g, 0.0)
                    by_column += g
                if COLUMNS:
                    of_columns = e * tl.load(v_ptr + i_s)[None, :]
                    if HAS_ROW_BIAS:
                        _, counts_r = biases(row_bias_ptr, i_r, i_r < rows)
                        of_columns = tl.where(counts_r[:, None], of_columns, 0.0)
                        by_row = tl.sum(of_columns, 1) / tl.load(scale_ptr)
                        p_r = (tile_s * SLOTS).to(tl.int64) * rows + i_r
                        tl.store(by_row_ptr + p_r, by_row, mask=i_r < rows)
                        for slot in tl.static_range(1, SLOTS):
                            tl.store(by_row_ptr + p_r + slot * rows, 0.0, mask=i_r < rows)
                    g += of_columns
            else:
                if COLUMNS:
                    factor = factor + tl.load(v_ptr + i_s)[None, :]
                g = tl.where(inside, e * factor, 0.0)
            if TOTAL:
                total += tl.sum(g, 1)
            p_g = g_ptr + first_r.to(tl.int64) * stride_g + first_s + (o_r * stride_g + o_s)
            tl.store(p_g, rounded(g, g_ptr, EMULATE))
        if HAS_COLUMN_BIAS:
            p_s = tile_r.to(tl.int64) * columns + i_s
            of_tile = tl.sum(by_column, 0) / tl.load(scale_ptr)
            tl.store(by_column_ptr + p_s, of_tile, mask=i_s < columns)
        if TOTAL:
            p_slot = sum_ptr + tl.program_id(0) * SLOTS
            tl.store(p_slot, tl.sum(total, 0) / tl.load(scale_ptr))
            for slot in tl.static_range(1, SLOTS):
                tl.store(p_slot + slot, 0.0)


def weigh(
    kept: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    logits: Logits,
    columns: bool,
    out: Tensor,
    sums: Tensor,
    bias_sums: tuple[Tensor, Tensor],
    slots: int,
    tiling: Tiling,
) -> None:
    """scale * G into `out` (R, S) from `kept` (R, S), but for flagged tiles.

    Both lie in buffers of `similarity.room_for`. `factors` are those of `flags.factors`; `sums`
    takes each tile's sum of G in the first of its `slots`, 0 in the others; empty where not wanted.
    `bias_sums` are those of `lean.gradient`.
    """
    r, s = kept.shape
    launch(
        weigh_kernel,
        -(-r // tiling.rows) * -(-s // tiling.columns),
        kept,
        out,
        *factors,
        logits.scale,
        *logits.lines(),
        sums,
        *bias_sums,
        kept.stride(0),
        out.stride(0),
        r,
        s,
        **logits.biased(),
        COLUMNS=columns,
        TOTAL=sums.numel() > 0,
        SLOTS=slots,
        EMULATE=INTERPRETED,
        BLOCK_R=tiling.rows,
        BLOCK_S=tiling.columns,
        GROUP=tiling.group,
        STEP=step_of(tiling.rows, logits.biases is not None),
        num_warps=tiling.warps,
    )


def step_of(rows: int, biased: bool) -> int:
    """How many of a tile's rows the kernel works on at a time."""
    return min(BIASED_STEP if biased else STEP, rows)
