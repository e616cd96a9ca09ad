"""The tiles that the common anchor does not serve (`flags.py`), each by its own maxima.

One program a multiprocessor walks over all tiles and works on those with a flagged line, as
`similarity.py` does; where nothing is flagged, the rule, it returns at once. What `lean.py` has
stored of such a tile is overwritten.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import (
    Tiling,
    launch,
    operands,
    persistent_programs,
    product_options,
)
from fastclip.kernels.lean import LeanStatistics, Logits
from fastclip.kernels.merge import MERGED_LINES, MERGED_TILES, merge_lines
from fastclip.kernels.similarity import VECTORS as SIMILARITY_VECTORS
from fastclip.kernels.similarity import own_gradient, own_statistics
from fastclip.kernels.tile import LOG2E, NO_DIAGONAL, any_raised, cosines, parts_of, tile_indices

NUMBERS = ["rows", "columns", "diagonal", "programs", "row_tiles", "column_tiles"]
VECTORS = [
    *SIMILARITY_VECTORS,
    *("flag_ptr", "raised_ptr", "row_part_max_ptr", "row_part_sum_ptr"),
    *("column_part_max_ptr", "column_part_sum_ptr"),
]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def flagged_statistics_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_id_ptr,
    column_id_ptr,
    row_bias_ptr,
    column_bias_ptr,
    row_max_ptr,
    row_sum_ptr,
    column_max_ptr,
    column_sum_ptr,
    flag_ptr,
    raised_ptr,
    stride_x,
    stride_y,
    rows,
    columns,
    width,
    diagonal,
    programs,
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(columns, BLOCK_S)
    if tl.load(raised_ptr) == 0:
        tiles = 0
    scale = tl.load(scale_ptr) * LOG2E
    for index in range(tl.program_id(0), tiles, programs):
        tile_r, tile_s = tile_indices(index, rows, columns, BLOCK_R, BLOCK_S, GROUP)
        i_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
        flag = tl.max(tl.load(flag_ptr + i_r, mask=i_r < rows, other=0), 0)
        if COLUMNS:
            i_s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
            of_columns = tl.load(flag_ptr + rows + i_s, mask=i_s < columns, other=0)
            flag = tl.maximum(flag, tl.max(of_columns, 0))
        if flag > 0:
            cos = cosines(
                x_ptr, y_ptr, stride_x, stride_y, rows, columns, width,
                tile_r * BLOCK_R, tile_s * BLOCK_S,
                BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
            )  # fmt: skip
            parts = parts_of(cos, PARTS)
            for part in tl.static_range(PARTS):
                own_statistics(
                    parts[part], scale, row_id_ptr, column_id_ptr, row_bias_ptr, column_bias_ptr,
                    row_max_ptr, row_sum_ptr, row_max_ptr, column_max_ptr, column_sum_ptr,
                    row_max_ptr, 0, rows, columns, diagonal, tile_r, tile_s * PARTS + part,
                    HAS_DIAGONAL, HAS_IDS, HAS_ROW_BIAS, HAS_COLUMN_BIAS, COLUMNS,
                    False, EMULATE, BLOCK_R, BLOCK_S // PARTS,
                )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def merge_flagged_kernel(
    row_part_max_ptr,
    row_part_sum_ptr,
    row_max_ptr,
    row_sum_ptr,
    column_part_max_ptr,
    column_part_sum_ptr,
    column_max_ptr,
    column_sum_ptr,
    offset_ptr,
    flag_ptr,
    raised_ptr,
    row_tiles,
    column_tiles,
    rows,
    columns,
    HAS_OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    offset = 0.0
    if HAS_OFFSET:
        offset = tl.load(offset_ptr)
    of_rows = tl.cdiv(rows, BLOCK_L)
    pid = tl.program_id(0)
    if tl.load(raised_ptr) > 0:
        if pid < of_rows:
            i = pid * BLOCK_L + tl.arange(0, BLOCK_L)
            mask = tl.load(flag_ptr + i, mask=i < rows, other=0) > 0
            merge_lines(
                row_part_max_ptr, row_part_sum_ptr, row_max_ptr, row_max_ptr, row_sum_ptr,
                row_max_ptr, offset, column_tiles, rows, i, mask, False, BLOCK_T, BLOCK_L,
            )  # fmt: skip
        else:
            i = (pid - of_rows) * BLOCK_L + tl.arange(0, BLOCK_L)
            mask = tl.load(flag_ptr + rows + i, mask=i < columns, other=0) > 0
            merge_lines(
                column_part_max_ptr, column_part_sum_ptr, row_max_ptr, column_max_ptr,
                column_sum_ptr, row_max_ptr, offset, row_tiles, columns, i, mask, False,
                BLOCK_T, BLOCK_L,
            )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def flagged_gradient_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    offset_ptr,
    row_id_ptr,
    column_id_ptr,
    row_bias_ptr,
    column_bias_ptr,
    row_lse_ptr,
    row_weight_ptr,
    column_lse_ptr,
    column_weight_ptr,
    raised_ptr,
    g_ptr,
    dot_ptr,
    sum_ptr,
    by_row_ptr,
    by_column_ptr,
    stride_x,
    stride_y,
    stride_g,
    rows,
    columns,
    width,
    diagonal,
    programs,
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    tiles_r, tiles_s = tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_S)
    blocks = tiles_r
    if COLUMNS:
        blocks += tiles_s
    tiles = tiles_r * tiles_s
    if any_raised(raised_ptr, blocks) == 0:
        tiles = 0
    scale = tl.load(scale_ptr)
    for index in range(tl.program_id(0), tiles, programs):
        tile_r, tile_s = tile_indices(index, rows, columns, BLOCK_R, BLOCK_S, GROUP)
        flag = tl.load(raised_ptr + tile_r)
        if COLUMNS:
            flag += tl.load(raised_ptr + tiles_r + tile_s)
        if flag > 0:
            cos = cosines(
                x_ptr, y_ptr, stride_x, stride_y, rows, columns, width,
                tile_r * BLOCK_R, tile_s * BLOCK_S,
                BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
            )  # fmt: skip
            parts = parts_of(cos, PARTS)
            for part in tl.static_range(PARTS):
                partial = index * PARTS + part
                own_gradient(
                    parts[part], scale, offset_ptr, row_id_ptr, column_id_ptr, row_bias_ptr,
                    column_bias_ptr, row_lse_ptr, row_weight_ptr, column_lse_ptr,
                    column_weight_ptr, g_ptr, dot_ptr + partial, sum_ptr + partial, by_row_ptr,
                    by_column_ptr, stride_g, rows, columns, diagonal, tile_r,
                    tile_s * PARTS + part, HAS_DIAGONAL, HAS_IDS, HAS_OFFSET, HAS_ROW_BIAS,
                    HAS_COLUMN_BIAS, COLUMNS, True, EMULATE, BLOCK_R, BLOCK_S // PARTS,
                )  # fmt: skip


def _options(logits: Logits, x: Any, tiling: Tiling) -> dict[str, Any]:
    """One kernel for what the usual way has several for: fewer to compile."""
    options = product_options(x, tiling)
    options["EVEN_D"] = options["TMA"]
    return {**options, **logits.options()}


def statistics(
    logits: Logits,
    found: LeanStatistics,
    flags: Tensor,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | None,
    tiling: Tiling,
) -> None:
    """Merge flagged lines into running (maximum, sum) of rows and columns, in place."""
    x, y = logits.x, logits.y
    r, s = x.shape[0], y.shape[0]
    tiles_r, tiles_s = -(-r // tiling.rows), -(-s // tiling.columns)
    row_part = found.row_sum.new_empty((2, tiles_s * tiling.parts, r))
    column_part = row_part.new_empty((2, tiles_r, s) if columns is not None else (2, 0, 0))
    x_in, y_in = operands(x, y, tiling)
    programs = persistent_programs(x.device, tiles_r * tiles_s)
    options = _options(logits, x_in, tiling)
    launch(
        flagged_statistics_kernel,
        programs,
        x_in,
        y_in,
        logits.scale,
        *((x, x) if logits.ids is None else logits.ids),
        *logits.lines(),
        *row_part,
        *column_part,
        flags,
        found.raised,
        x.stride(0),
        y.stride(0),
        r,
        s,
        x.shape[1],
        NO_DIAGONAL if logits.diagonal is None else logits.diagonal,
        programs,
        COLUMNS=columns is not None,
        **options,
    )
    of_columns = 0 if columns is None else s
    launch(
        merge_flagged_kernel,
        -(-r // MERGED_LINES) + -(-of_columns // MERGED_LINES),
        *row_part,
        *rows,
        *column_part,
        *(rows if columns is None else columns),
        logits.scalars()[1],
        flags,
        found.raised,
        column_part.shape[1],
        row_part.shape[1],
        r,
        of_columns,
        HAS_OFFSET=logits.offset is not None,
        BLOCK_T=MERGED_TILES,
        BLOCK_L=MERGED_LINES,
    )


def gradient(
    logits: Logits,
    raised: Tensor,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | None,
    out: Tensor,
    scalars: tuple[Tensor, Tensor],
    bias_sums: tuple[Tensor, Tensor],
    tiling: Tiling,
) -> None:
    """What `lean.gradient` leaves of `out` and of sums, from (lse, weight) of the lines.

    The sides of its tiles are those of `lean.gradient`; its parts are the slots there.
    """
    x, y = logits.x, logits.y
    r, s = x.shape[0], y.shape[0]
    x_in, y_in = operands(x, y, tiling)
    tiles = -(-r // tiling.rows) * -(-s // tiling.columns)
    programs = persistent_programs(x.device, tiles)
    options = _options(logits, x_in, tiling)
    launch(
        flagged_gradient_kernel,
        programs,
        x_in,
        y_in,
        *logits.scalars(),
        *((x, x) if logits.ids is None else logits.ids),
        *logits.lines(),
        *rows,
        *(rows if columns is None else columns),
        raised,
        out,
        *scalars,
        *bias_sums,
        x.stride(0),
        y.stride(0),
        out.stride(0),
        r,
        s,
        x.shape[1],
        NO_DIAGONAL if logits.diagonal is None else logits.diagonal,
        programs,
        COLUMNS=columns is not None,
        HAS_OFFSET=logits.offset is not None,
        **options,
    )
