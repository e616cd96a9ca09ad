"""The walk over a symmetric S = Z @ Z.T, each pair of rows visited once.

Z is made of B blocks of N rows in the same pair order (views, texts), each of one domain; a pair
of domains has its scale and offset. A strip of rows [a, b) meets the columns [a, M) only: its
own square gives statistics to its rows, the columns to its right give them to both sides. With
u_i = a_i exp(-lse_i) the gradient of a pair is symmetric, exp(S_ij) (u_i + u_j), so the same
strip of G serves both of its sides. Forward and backward take half a product and one and a half:
2 g for M x M x D, where the plain way takes 4.

Shape suffixes: B blocks, N pairs, M = B N rows, D width, P domains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.ops.gemm import add_product
from fastclip.ops.tiles import (
    Lines,
    Running,
    Tile,
    Tiles,
    chunk_rows,
    chunks,
    finished_room,
    whole_tiles,
)

STRIPS = 16
LEAST_STRIP = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class Blocks:
    """Block b holds rows [b N, (b + 1) N), of domain domains[b]; rows of one pair are no negatives.

    One block alone means that a row leaves out itself only.
    """

    pairs: int
    domains: Sequence[int]

    @property
    def rows(self) -> int:
        return self.pairs * len(self.domains)

    def couples(self) -> list[tuple[int, int]]:
        """(b, c) with b < c, in the order of the positives."""
        count = len(self.domains)
        return [(b, c) for b in range(count) for c in range(b + 1, count)]

    def block(self, index: int) -> slice:
        """The rows of a block."""
        return slice(index * self.pairs, (index + 1) * self.pairs)


@dataclass(frozen=True)
class _Segment:
    """Columns [start, stop) beside a strip, all of block `block`."""

    start: int
    stop: int
    block: int
    square: bool
    diagonal: int | None


def statistics(
    tiles: Tiles,
    z_MD: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    shape: Blocks,
    chunk: int,
) -> Running:
    """Statistics of all rows over the negatives of all domains; half a product of M x M x D."""
    z_op_MD = tiles.operand(z_MD)
    lines = Running.of(shape.rows, z_MD, tiles.dtype)
    for start, stop, block in _strips(tiles, z_MD, shape, chunk):
        for segment in _segments(shape, start, stop, block):
            tile = _tile(z_op_MD, scale_PP, offset_PP, shape, start, stop, block, segment)
            columns = None if segment.square else lines.part(segment.start, segment.stop)
            tiles.statistics(tile, lines.part(start, stop), columns)
    return lines


def statistics_gradient(
    tiles: Tiles,
    z_MD: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    shape: Blocks,
    lse_M: Tensor,
    d_lse_M: Tensor,
    need_scalars: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dZ unfinished, in the accumulator's dtype, and dscale and doffset, (P, P).

    An entry (p, q) of the two has what was met with domain p in the row's place.
    """
    z_op_MD = tiles.operand(z_MD)
    z_grad_MD = tiles.gradient_operand(z_op_MD)
    dz_MD = z_MD.new_zeros(z_MD.shape, dtype=tiles.dtype)
    dscale_PP = torch.zeros_like(scale_PP)
    doffset_PP = torch.zeros_like(scale_PP)
    for start, stop, block in _strips(tiles, z_MD, shape, chunk):
        G_CR = tiles.gradient_buffer(stop - start, z_grad_MD[start:])
        rows = Lines(lse_M[start:stop], d_lse_M[start:stop])
        for segment in _segments(shape, start, stop, block):
            tile = _tile(z_op_MD, scale_PP, offset_PP, shape, start, stop, block, segment)
            seen = slice(segment.start, segment.stop)
            G_CS = G_CR[:, segment.start - start : segment.stop - start]
            columns = Lines(lse_M[seen], d_lse_M[seen])
            dscale, doffset = tiles.gradient(tile, rows, columns, G_CS, need_scalars)
            if need_scalars:
                # a square meets each of its pairs twice
                share = 0.5 if segment.square else 1.0
                p, q = shape.domains[block], shape.domains[segment.block]
                dscale_PP[p, q] += share * dscale
                doffset_PP[p, q] += share * doffset
        add_product(dz_MD[start:stop], G_CR, z_grad_MD[start:])
        if stop < shape.rows:
            add_product(dz_MD[stop:], G_CR[:, stop - start :].T, z_grad_MD[start:stop])
    return dz_MD, dscale_PP, doffset_PP


def positive_cosines(tiles: Tiles, z_MD: Tensor, shape: Blocks) -> Tensor:
    """Cosines of each pair's rows, (B (B - 1) / 2, N) in the order of `shape.couples()`."""
    return torch.stack(
        [tiles.row_dot(z_MD[shape.block(b)], z_MD[shape.block(c)]) for b, c in shape.couples()]
    )


def couple_entries(table_PP: Tensor, shape: Blocks) -> Tensor:
    """The entries of a table by domain pair for each couple of blocks, (couples, 1)."""
    entries = [table_PP[shape.domains[b], shape.domains[c]] for b, c in shape.couples()]
    return torch.stack(entries)[:, None]


def finish_positives(
    tiles: Tiles,
    dz_MD: Tensor,
    z_MD: Tensor,
    coefficient_QN: Tensor,
    shape: Blocks,
    dtype: torch.dtype,
) -> Tensor:
    """Add coefficient * partner to both rows of each positive pair and cast; `dz_MD` is spent."""
    out_MD = finished_room(dz_MD, dtype)
    couples = shape.couples()
    for block in range(len(shape.domains)):
        terms = [
            (coefficient_QN[index], z_MD[shape.block(c if b == block else b)])
            for index, (b, c) in enumerate(couples)
            if block in (b, c)
        ]
        rows = shape.block(block)
        tiles.finish(dz_MD[rows], terms, out_MD[rows])
    return out_MD


def _strips(
    tiles: Tiles, z_MD: Tensor, shape: Blocks, chunk_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, block) of strips of rows, none across a border of blocks."""
    device = z_MD.device.type
    size = chunk_rows(shape.pairs, shape.rows, tiles.itemsize, chunk_bytes, device)
    # a strip's own square is visited twice, so strips are narrow: but not too narrow for a product
    narrow = max(shape.rows // STRIPS, LEAST_STRIP.get(device, 256))
    size = min(size, whole_tiles(narrow, size) if device == "cuda" else narrow)
    for block in range(len(shape.domains)):
        rows = shape.block(block)
        for start, stop in chunks(rows.start, rows.stop, size):
            yield start, stop, block


def _segments(shape: Blocks, start: int, stop: int, block: int) -> Iterator[_Segment]:
    yield _Segment(start, stop, block, True, 0)
    own = shape.block(block)
    if stop < own.stop:
        yield _Segment(stop, own.stop, block, False, None)
    for other in range(block + 1, len(shape.domains)):
        columns = shape.block(other)
        yield _Segment(columns.start, columns.stop, other, False, start - own.start)


def _tile(
    z_MD: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    shape: Blocks,
    start: int,
    stop: int,
    block: int,
    segment: _Segment,
) -> Tile:
    entry = shape.domains[block], shape.domains[segment.block]
    offset = None if offset_PP is None else offset_PP[entry]
    columns = z_MD[segment.start : segment.stop]
    return Tile(z_MD[start:stop], columns, scale_PP[entry], offset, segment.diagonal)
