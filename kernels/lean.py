"""Statistics and gradient of a tile of S about an anchor that all of a call's lines share.

    S' = S log2(e) = (scale * X @ Y.T + offset) log2(e);   E = 2^(S' - c)
    statistics   sums of E over a tile's rows and columns; where asked for, E itself and maxima
    gradient     G_ij = scale * E_ij * (u_i + v_j), rounded once; float32 sums of G * cos and G

Cosines lie in [-1, 1], so one number c serves every row and column unless scales are very large,
features are not normalized, or a line's entries are all far below what they could be. Sums show
which lines that holds for: those outside [2^-80, 2^127) are flagged on the device
(`flags.py`) and computed again by their own maxima (`flagged.py`). Nothing is read by the host,
and bits depend on data alone. `exp2` on the device flushes to 0 below 2^-126: the sum of a line
that is not flagged has lost less than 2^-46 of itself for each of its terms.

With biases a of rows and b of columns, at most 0, S' has both in it: a line's own bias is the same
for all of its entries and is taken from its log-sum-exp again (`flags.py`), so that one E serves
rows and columns here too. A bias of -inf is 0 in E; its line is left out of the sums and of the
shares in G that it would enter.

c is max(|scale| log2(e) - 100, 0) + offset log2(e): at scales that training meets, up to 69, it is
the offset's alone. A scale above 208 spans more than any anchor can serve; c is then infinite, no
product is formed and every line is flagged. Finite biases widen that span by how far they reach
down, and c is as much lower as keeps 100 powers of two above it at the most.

A tile's parts are summed before they are stored: partial statistics are (tiles, lines).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import Tiling, launch, operands, product_options, programs_of
from fastclip.kernels.tile import (
    LEFT_OUT,
    LOG2E,
    NO_DIAGONAL,
    biases,
    cosines,
    leave_out,
    over_rows,
    parts_of,
    rounded,
    tile_indices,
    visits,
)

NUMBERS = ["rows", "columns", "diagonal"]
VECTORS = [
    *("scale_ptr", "offset_ptr", "row_id_ptr", "column_id_ptr", "row_sum_ptr"),
    *("column_sum_ptr", "row_max_ptr", "column_max_ptr", "raised_ptr", "dot_ptr", "sum_ptr"),
    *("row_bias_ptr", "column_bias_ptr", "spread_ptr", "by_row_ptr", "by_column_ptr"),
]

# powers of two: the anchor leaves 27 for sums above the largest entry it allows for
BELOW_LARGEST = tl.constexpr(100.0)
LARGEST_SPAN = tl.constexpr(600.0)


@triton.jit
def anchor_without_offset(scale_ptr, spread_ptr, BIASED: tl.constexpr):
    """What is subtracted from scale * cos * log2(e): the anchor less the offset, in powers of two.

    Infinite where no anchor serves.
    """
    largest = tl.abs(tl.load(scale_ptr)) * LOG2E
    span = 2.0 * largest
    if BIASED:
        span += tl.load(spread_ptr) * LOG2E
        anchor = largest - tl.minimum(0.5 * span, BELOW_LARGEST)
    else:
        anchor = tl.maximum(largest - BELOW_LARGEST, 0.0)
    return tl.where(span > LARGEST_SPAN, float("inf"), anchor)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def lean_statistics_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_id_ptr,
    column_id_ptr,
    row_bias_ptr,
    column_bias_ptr,
    spread_ptr,
    row_sum_ptr,
    column_sum_ptr,
    row_max_ptr,
    column_max_ptr,
    raised_ptr,
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
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAXIMA: tl.constexpr,
    KEEP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
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
        first_r = tile_r * BLOCK_R
        anchor = anchor_without_offset(scale_ptr, spread_ptr, HAS_ROW_BIAS or HAS_COLUMN_BIAS)
        # without an anchor there is nothing to form: all lines are flagged by sums of 0
        cos = cosines(
            x_ptr, y_ptr, stride_x, stride_y, rows, columns,
            tl.where(anchor == float("inf"), 0, width), first_r, tile_s * BLOCK_S,
            BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
        )  # fmt: skip
        scale = tl.load(scale_ptr) * LOG2E
        if index == 0:
            # for the flags that follow
            tl.store(raised_ptr, 0)
        parts = parts_of(cos, PARTS)
        i_r = first_r + tl.arange(0, BLOCK_R)
        m_r = i_r < rows
        row_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
        row_max = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
        if HAS_ROW_BIAS:
            bias_r, counts_r = biases(row_bias_ptr, i_r, m_r)
        PART_S: tl.constexpr = BLOCK_S // PARTS
        for part in tl.static_range(PARTS):
            first_s = tile_s * BLOCK_S + part * PART_S
            i_s = first_s + tl.arange(0, PART_S)
            m_s = i_s < columns
            # rounded as one: S' may be a hundred times what is left of it
            logits = parts[part] * scale - anchor
            if HAS_ROW_BIAS:
                logits += bias_r[:, None]
            if HAS_COLUMN_BIAS:
                bias_s, counts_s = biases(column_bias_ptr, i_s, m_s)
                logits += bias_s[None, :]
            logits = leave_out(
                logits, row_id_ptr, column_id_ptr, rows, columns, diagonal,
                i_r, i_s, first_r, first_s, HAS_DIAGONAL, HAS_IDS, float("-inf"), BLOCK_R, PART_S,
            )  # fmt: skip
            e = tl.exp2(logits)
            of_rows = e
            if HAS_COLUMN_BIAS:
                of_rows = tl.where(counts_s[None, :], e, 0.0)
            row_sum += tl.sum(of_rows, 1)
            p_s = tile_r.to(tl.int64) * columns + i_s
            if COLUMNS:
                of_columns = e
                if HAS_ROW_BIAS:
                    of_columns = tl.where(counts_r[:, None], e, 0.0)
                column_sum = over_rows(of_columns, BLOCK_R, PART_S, False, TRANSPOSE)
                tl.store(column_sum_ptr + p_s, column_sum, mask=m_s)
            if MAXIMA:
                of_rows = logits
                if HAS_COLUMN_BIAS:
                    of_rows = tl.where(counts_s[None, :], logits, float("-inf"))
                row_max = tl.maximum(row_max, tl.max(of_rows, 1))
                if COLUMNS:
                    of_columns = logits
                    if HAS_ROW_BIAS:
                        of_columns = tl.where(counts_r[:, None], logits, float("-inf"))
                    column_max = over_rows(of_columns, BLOCK_R, PART_S, True, TRANSPOSE)
                    tl.store(column_max_ptr + p_s, column_max, mask=m_s)
            if KEEP:
                o_e = tl.arange(0, BLOCK_R)[:, None] * stride_e + tl.arange(0, PART_S)[None, :]
                p_e = e_ptr + first_r.to(tl.int64) * stride_e + first_s + o_e
                tl.store(p_e, rounded(e, e_ptr, EMULATE))
        p_r = tile_s.to(tl.int64) * rows + i_r
        tl.store(row_sum_ptr + p_r, row_sum, mask=m_r)
        if MAXIMA:
            tl.store(row_max_ptr + p_r, row_max, mask=m_r)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def lean_gradient_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    offset_ptr,
    row_id_ptr,
    column_id_ptr,
    row_bias_ptr,
    column_bias_ptr,
    spread_ptr,
    u_ptr,
    v_ptr,
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
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_COLUMN_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALARS: tl.constexpr,
    SLOTS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
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
        first_r = tile_r * BLOCK_R
        # of a tile with a flagged line no product is formed; `flagged.py` overwrites what is stored
        raised = tl.load(raised_ptr + tile_r)
        if COLUMNS:
            raised += tl.load(raised_ptr + tl.cdiv(rows, BLOCK_R) + tile_s)
        cos = cosines(
            x_ptr, y_ptr, stride_x, stride_y, rows, columns, tl.where(raised > 0, 0, width),
            first_r, tile_s * BLOCK_S,
            BLOCK_R, BLOCK_S, BLOCK_D, TMA, EVEN_D, PRECISION, EMULATE,
        )  # fmt: skip
        anchor = anchor_without_offset(scale_ptr, spread_ptr, HAS_ROW_BIAS or HAS_COLUMN_BIAS)
        scale = tl.load(scale_ptr)
        parts = parts_of(cos, PARTS)
        i_r = first_r + tl.arange(0, BLOCK_R)
        # factors are padded to whole tiles, with 0
        u = tl.load(u_ptr + i_r)
        dot = tl.zeros((BLOCK_R,), dtype=tl.float32)
        total = tl.zeros((BLOCK_R,), dtype=tl.float32)
        if HAS_ROW_BIAS:
            bias_r, counts_r = biases(row_bias_ptr, i_r, i_r < rows)
            by_row = tl.zeros((BLOCK_R,), dtype=tl.float32)
        PART_S: tl.constexpr = BLOCK_S // PARTS
        for part in tl.static_range(PARTS):
            first_s = tile_s * BLOCK_S + part * PART_S
            i_s = first_s + tl.arange(0, PART_S)
            logits = parts[part] * (scale * LOG2E) - anchor
            if HAS_ROW_BIAS:
                logits += bias_r[:, None]
            if HAS_COLUMN_BIAS:
                bias_s, counts_s = biases(column_bias_ptr, i_s, i_s < columns)
                logits += bias_s[None, :]
            logits = leave_out(
                logits, row_id_ptr, column_id_ptr, rows, columns, diagonal, i_r, i_s,
                first_r, first_s, HAS_DIAGONAL, HAS_IDS, LEFT_OUT, BLOCK_R, PART_S,
            )  # fmt: skip
            g = tl.exp2(logits)
            if HAS_ROW_BIAS or HAS_COLUMN_BIAS:
                of_rows = g * u[:, None]
                if HAS_COLUMN_BIAS:
                    of_rows = tl.where(counts_s[None, :], of_rows, 0.0)
                    p_s = tile_r.to(tl.int64) * columns + i_s
                    by_column = over_rows(of_rows, BLOCK_R, PART_S, False, TRANSPOSE) / scale
                    tl.store(by_column_ptr + p_s, by_column, mask=i_s < columns)
                if COLUMNS:
                    of_columns = g * tl.load(v_ptr + i_s)[None, :]
                    if HAS_ROW_BIAS:
                        of_columns = tl.where(counts_r[:, None], of_columns, 0.0)
                        by_row += tl.sum(of_columns, 1)
                    g = of_rows + of_columns
                else:
                    g = of_rows
            elif COLUMNS:
                g *= u[:, None] + tl.load(v_ptr + i_s)[None, :]
            else:
                g *= u[:, None]
            if SCALARS:
                dot += tl.sum(g * parts[part], 1)
                if HAS_OFFSET:
                    total += tl.sum(g, 1)
            o_g = tl.arange(0, BLOCK_R)[:, None] * stride_g + tl.arange(0, PART_S)[None, :]
            p_g = g_ptr + first_r.to(tl.int64) * stride_g + first_s + o_g
            tl.store(p_g, rounded(g, g_ptr, EMULATE))
        if HAS_ROW_BIAS:
            p_r = (tile_s * SLOTS).to(tl.int64) * rows + i_r
            tl.store(by_row_ptr + p_r, by_row / scale, mask=i_r < rows)
            for slot in tl.static_range(1, SLOTS):
                tl.store(by_row_ptr + p_r + slot * rows, 0.0, mask=i_r < rows)
        if SCALARS:
            # the factors have the scale in them
            p_slot = index * SLOTS
            tl.store(dot_ptr + p_slot, tl.sum(dot, 0) / scale)
            if HAS_OFFSET:
                tl.store(sum_ptr + p_slot, tl.sum(total, 0) / scale)
            for slot in tl.static_range(1, SLOTS):
                tl.store(dot_ptr + p_slot + slot, 0.0)
                if HAS_OFFSET:
                    tl.store(sum_ptr + p_slot + slot, 0.0)


class Biases(NamedTuple):
    """Biases of a tile's lines, at most 0, and how far all of a call's reach down, 0-d.

    Those of rows are there where its columns have statistics.
    """

    row: Tensor | None
    column: Tensor | None
    spread: Tensor


class Logits(NamedTuple):
    """What a tile of S is made of.

    ids: of rows and columns; entries whose ids agree are left out, as is the entry (r, r +
    diagonal).
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    offset: Tensor | None
    ids: tuple[Tensor, Tensor] | None
    diagonal: int | None
    biases: Biases | None = None

    def scalars(self) -> tuple[Tensor, Tensor]:
        """Scale and offset, as kernels take them."""
        return self.scale, self.scale if self.offset is None else self.offset

    def lines(self) -> tuple[Tensor, Tensor]:
        """Biases of rows and columns, as kernels take them."""
        row, column, _ = self.biases or (None, None, None)
        return self.scale if row is None else row, self.scale if column is None else column

    def spread(self) -> Tensor:
        """That of the biases, as kernels take it."""
        return self.scale if self.biases is None else self.biases.spread

    def biased(self) -> dict[str, bool]:
        """Keyword arguments of kernels that know biases."""
        row, column, _ = self.biases or (None, None, None)
        return {"HAS_ROW_BIAS": row is not None, "HAS_COLUMN_BIAS": column is not None}

    def options(self) -> dict[str, bool]:
        """Keyword arguments of a kernel of this file."""
        return {
            # always: a kernel less to compile
            "HAS_DIAGONAL": True,
            "HAS_IDS": self.ids is not None,
            **self.biased(),
        }


class LeanStatistics(NamedTuple):
    """Partial sums of E and, where wanted, maxima of S' - c: the rows', (column tiles, R), and the
    columns', (row tiles, S) or empty. `raised` is 0, (1,): for flags of lines.
    """

    row_sum: Tensor
    column_sum: Tensor
    row_max: Tensor
    column_max: Tensor
    raised: Tensor


def statistics(
    logits: Logits, columns: bool, maxima: bool, kept: Tensor | None, tiling: Tiling
) -> LeanStatistics:
    """Partial statistics; with `columns` theirs too.

    `kept` (R, S), in a buffer of `similarity.room_for`, takes E.
    """
    x, y = logits.x, logits.y
    r, s = x.shape[0], y.shape[0]
    tiles_r, tiles_s = -(-r // tiling.rows), -(-s // tiling.columns)
    of_rows, of_columns = (tiles_s, r), (tiles_r, s) if columns else (0, 0)
    row_sum = x.new_empty(of_rows, dtype=torch.float32)
    column_sum = row_sum.new_empty(of_columns)
    row_max = row_sum.new_empty(of_rows if maxima else (0, 0))
    column_max = row_sum.new_empty(of_columns if maxima else (0, 0))
    raised = x.new_empty(1, dtype=torch.int32)
    x_in, y_in = operands(x, y, tiling)
    programs, walk = programs_of(tiling, x.device, tiles_r * tiles_s)
    launch(
        lean_statistics_kernel,
        programs,
        x_in,
        y_in,
        # the anchor has the offset in it
        logits.scale,
        *((x, x) if logits.ids is None else logits.ids),
        *logits.lines(),
        logits.spread(),
        row_sum,
        column_sum,
        row_max,
        column_max,
        raised,
        row_sum if kept is None else kept,
        x.stride(0),
        y.stride(0),
        0 if kept is None else kept.stride(0),
        r,
        s,
        x.shape[1],
        NO_DIAGONAL if logits.diagonal is None else logits.diagonal,
        **logits.options(),
        COLUMNS=columns,
        MAXIMA=maxima,
        KEEP=kept is not None,
        TRANSPOSE=tiling.transpose,
        FLATTEN=walk,
        **product_options(x_in, tiling),
    )
    return LeanStatistics(row_sum, column_sum, row_max, column_max, raised)


def gradient(
    logits: Logits,
    factors: tuple[Tensor, Tensor, Tensor],
    columns: bool,
    out: Tensor,
    scalars: tuple[Tensor, Tensor],
    bias_sums: tuple[Tensor, Tensor],
    slots: int,
    tiling: Tiling,
) -> None:
    """scale * G into `out` (R, S), in a buffer of `similarity.room_for`, but for flagged tiles.

    `factors` are those of `flags.factors`; `scalars` take each tile's sums of G * cos and, with
    an offset, of G in the first of its `slots`, 0 in the others; empty where not wanted. So do
    `bias_sums`: (column tiles * slots, R), the sums of the columns' shares of G over a tile's rows,
    and (row tiles, S), those of the rows' shares over its columns.
    """
    x, y = logits.x, logits.y
    r, s = x.shape[0], y.shape[0]
    x_in, y_in = operands(x, y, tiling)
    tiles = -(-r // tiling.rows) * -(-s // tiling.columns)
    programs, walk = programs_of(tiling, x.device, tiles)
    launch(
        lean_gradient_kernel,
        programs,
        x_in,
        y_in,
        *logits.scalars(),
        *((x, x) if logits.ids is None else logits.ids),
        *logits.lines(),
        logits.spread(),
        *factors,
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
        **logits.options(),
        HAS_OFFSET=logits.offset is not None,
        COLUMNS=columns,
        SCALARS=scalars[0].numel() > 0,
        SLOTS=slots,
        TRANSPOSE=tiling.transpose,
        FLATTEN=walk,
        **product_options(x_in, tiling),
    )
