"""In which order the tiles of S are visited. The order of every sum, and so its bits, depend on it.

    rectangle   chunks of own rows, each against all columns of a part
    strip       the same, where S is symmetric and the columns are those of all ranks: a pair of
                rows is met on both its owners' strips
    triangle    all of a symmetric S: a strip of rows [a, b) meets the columns [a, M) only, its own
                square and what lies to its right, so each pair of rows is visited once

Shape suffixes: N own rows, P columns of a part, D width.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fastclip.ops.chunks import chunk_rows, chunks, whole_tiles
from fastclip.ops.columns import Part, Segment
from fastclip.ops.problem import Problem
from fastclip.ops.tiles.base import Tile

STRIPS = 16
LEAST_STRIP = {"cpu": 256, "cuda": 1024}


class Visit(NamedTuple):
    """One tile.

    place: where in S its columns are. columns: the same, None if they have no statistics. in_G:
    where they are in the chunk's G. domains: of its rows and columns. twice: whether the mirror
    image of every entry is visited too, so that the tile has statistics for its rows only and
    counts half.
    """

    tile: Tile
    place: slice
    columns: slice | None
    in_G: slice
    domains: tuple[int, int]
    twice: bool


class Chunk(NamedTuple):
    """Own rows that are held in memory at a time, and the tiles they are visited in.

    first: the part's first column that G has. right: the first column that gets a gradient from
    G.T. In a triangle, the columns before it are the chunk's own rows, whose gradient is dX's.
    """

    rows: slice
    first: int
    right: int
    visits: list[Visit]


def visit(problem: Problem, part: Part, x_op_ND: Tensor, y_op_PD: Tensor) -> Iterator[Chunk]:
    """All rows against a part's columns, given as they enter S."""
    if problem.is_triangle:
        yield from _triangle(problem, x_op_ND)
        return
    segments = problem.segments(part)
    first = segments[0].start if segments else len(y_op_PD)
    blocks = problem.row_blocks
    height = blocks[0].stop
    device, budget = x_op_ND.device.type, problem.options.chunk_bytes
    size = chunk_rows(height, len(y_op_PD), problem.tiles.itemsize, budget, device)
    for block, rows in enumerate(blocks):
        for start, stop in chunks(rows.start, rows.stop, size):
            chunk = slice(start, stop)
            visits = [_visit(problem, x_op_ND, y_op_PD, chunk, block, s, first) for s in segments]
            yield Chunk(chunk, first, first, visits)


def strip_rows(block: int, rows: int, itemsize: int, chunk_bytes: int, device: str) -> int:
    """Rows of a strip of a triangle, whose blocks have `block` of all `rows`."""
    size = chunk_rows(block, rows, itemsize, chunk_bytes, device)
    # a strip's own square is visited twice, so strips are narrow: but not too narrow for a product
    narrow = max(rows // STRIPS, LEAST_STRIP.get(device, 256))
    return min(size, whole_tiles(narrow, size) if device == "cuda" else narrow)


def highest_strip(block: int, rows: int) -> int:
    """A bound of `strip_rows` for any chunk and device."""
    return min(block, max(rows // STRIPS, *LEAST_STRIP.values()) + 127)


def _triangle(problem: Problem, z_op_ND: Tensor) -> Iterator[Chunk]:
    blocks = problem.row_blocks
    device, budget = z_op_ND.device.type, problem.options.chunk_bytes
    height, rows = blocks[0].stop, len(z_op_ND)
    size = strip_rows(height, rows, problem.tiles.itemsize, budget, device)
    for block, own in enumerate(blocks):
        for start, stop in chunks(own.start, own.stop, size):
            segments = [Segment(start, stop, start, block)]
            if stop < own.stop:
                segments.append(Segment(stop, own.stop, stop, block))
            for other in range(block + 1, len(blocks)):
                columns = blocks[other]
                segments.append(Segment(columns.start, columns.stop, columns.start, other))
            chunk = slice(start, stop)
            visits = [
                _visit(problem, z_op_ND, z_op_ND, chunk, block, s, start)._replace(
                    twice=s.start == start
                )
                for s in segments
            ]
            yield Chunk(chunk, start, stop, visits)


def _visit(
    problem: Problem,
    x_op_ND: Tensor,
    y_op_PD: Tensor,
    rows: slice,
    block: int,
    segment: Segment,
    first: int,
) -> Visit:
    y_op_SD = y_op_PD[segment.start : segment.stop]
    tile = problem.tile(x_op_ND[rows], y_op_SD, rows.start, block, segment)
    columns = slice(segment.column, segment.column + len(y_op_SD))
    return Visit(
        tile,
        columns,
        columns if segment.column < problem.paired else None,
        slice(segment.start - first, segment.stop - first),
        (problem.domains[block], problem.domains[segment.block]),
        problem.is_symmetric,
    )
