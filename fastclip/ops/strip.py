"""The walk over one rank's strip of a symmetric S = scale * Z @ Z.T + offset.

The rows are this rank's, all blocks of its pairs; the columns are every rank's and come in parts
from `columns.py`. G is symmetric: with the log-sum-exps and upstream gradients of all rows at
hand (8 bytes a row), the strip gives this rank's dZ whole, so no gradient is sent. A pair of rows
is met on both its owners' strips: three products of the strip, where one process alone needs two
(`triangle.py`).

Shape suffixes: B blocks, N own pairs, M = B N own rows, R columns of a part, D width, P domains.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.ops.columns import Columns, Part, Segment
from fastclip.ops.gemm import add_product
from fastclip.ops.tiles import Lines, Running, Tile, Tiles, chunk_rows, chunks
from fastclip.ops.triangle import Blocks

See = Callable[[Part], None]


def statistics(
    tiles: Tiles,
    z_MD: Tensor,
    collected: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    shape: Blocks,
    columns: Columns,
    chunk_bytes: int,
    see: See = lambda part: None,
) -> Running:
    """Statistics of own rows over the negatives of all; one product of the strip.

    `see` is called with each part.
    """
    rows = _Rows(tiles.operand(z_MD), scale_PP, offset_PP, shape, columns)
    lines = Running.of(shape.rows, z_MD, tiles.dtype)
    for part in columns.parts(z_MD, collected):
        see(part)
        z_op_RD = tiles.operand(part.features)
        for start, stop, block in _strips(tiles, z_MD, len(z_op_RD), shape, chunk_bytes):
            for segment in part.segments:
                tile = rows.tile(z_op_RD, start, stop, block, segment)
                tiles.statistics(tile, lines.part(start, stop), None)
    return lines


def statistics_gradient(
    tiles: Tiles,
    z_MD: Tensor,
    collected: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    shape: Blocks,
    columns: Columns,
    lse_M: Tensor,
    d_lse_M: Tensor,
    need_scalars: bool,
    chunk_bytes: int,
    see: See = lambda part: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dZ unfinished, in the accumulator's dtype, and this rank's shares of dscale and doffset.

    An entry (p, q) of the two, (P, P), has what was met with domain p in the row's place.
    """
    rows = _Rows(tiles.operand(z_MD), scale_PP, offset_PP, shape, columns)
    pairs = columns.all_lines(torch.stack((lse_M, d_lse_M), dim=1))
    all_lse, all_d_lse = (line.contiguous() for line in pairs.unbind(dim=1))
    dz_MD = z_MD.new_zeros(z_MD.shape, dtype=tiles.dtype)
    dscale_PP, doffset_PP = torch.zeros_like(scale_PP), torch.zeros_like(scale_PP)
    for part in columns.parts(z_MD, collected):
        see(part)
        z_op_RD = tiles.operand(part.features)
        z_grad_RD = tiles.gradient_operand(z_op_RD)
        for start, stop, block in _strips(tiles, z_MD, len(z_op_RD), shape, chunk_bytes):
            G_CR = tiles.gradient_buffer(stop - start, z_grad_RD)
            for segment in part.segments:
                tile = rows.tile(z_op_RD, start, stop, block, segment)
                seen = slice(segment.column, segment.column + segment.stop - segment.start)
                dscale, doffset = tiles.gradient(
                    tile,
                    Lines(lse_M[start:stop], d_lse_M[start:stop]),
                    Lines(all_lse[seen], all_d_lse[seen]),
                    G_CR[:, segment.start : segment.stop],
                    need_scalars,
                )
                if need_scalars:
                    # the pair's other row meets it too, here or on another rank
                    p, q = shape.domains[block], shape.domains[segment.block]
                    dscale_PP[p, q] += 0.5 * dscale
                    doffset_PP[p, q] += 0.5 * doffset
            add_product(dz_MD[start:stop], G_CR, z_grad_RD)
    return dz_MD, dscale_PP, doffset_PP


def _strips(
    tiles: Tiles, z_MD: Tensor, columns: int, shape: Blocks, chunk_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, block) of chunks of own rows, none across a border of blocks."""
    device = z_MD.device.type
    size = chunk_rows(shape.pairs, columns, tiles.itemsize, chunk_bytes, device)
    for block in range(len(shape.domains)):
        rows = shape.block(block)
        for start, stop in chunks(rows.start, rows.stop, size):
            yield start, stop, block


@dataclass(frozen=True)
class _Rows:
    """Own rows as they enter S, and what makes a tile of some of them and some columns."""

    z_op_MD: Tensor
    scale_PP: Tensor
    offset_PP: Tensor | None
    shape: Blocks
    columns: Columns

    def tile(self, z_op_RD: Tensor, start: int, stop: int, block: int, segment: Segment) -> Tile:
        layout = self.columns.layout
        entry = self.shape.domains[block], self.shape.domains[segment.block]
        # numbers of the pairs, over all ranks, that the first row and the first column are of
        row_pair = layout.start(0, layout.rank) + start - self.shape.block(block).start
        column_pair = segment.column - layout.start(segment.block, 0)
        return Tile(
            self.z_op_MD[start:stop],
            z_op_RD[segment.start : segment.stop],
            self.scale_PP[entry],
            None if self.offset_PP is None else self.offset_PP[entry],
            row_pair - column_pair,
        )
