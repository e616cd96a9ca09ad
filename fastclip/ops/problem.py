"""What an operator is asked: the similarity matrix S of one call, and the processes that share it.

    S = scale * X @ Y.T + offset

Rows are this process's; columns are this process's or, where several share a batch, those of all
(`columns.py`). A rectangle has X of N rows and Y of M columns. A symmetric S has X = Y, blocks of
rows in the same pair order (views, texts), each of one domain; a pair of domains has its scale
and offset.

`Options` is all of it that is no tensor: a plain record, which travels by keyword into a custom
operator and through a traced graph. `Problem` is made from it inside the operator.

Shape suffixes: N own rows, M own columns, D width, P domains, C rows and S columns of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.ops.collectives import Ranks, rank_in
from fastclip.ops.columns import Columns, Part, Segment, columns_of
from fastclip.ops.numerics import away_from_zero, finite
from fastclip.ops.tiles.base import LogSumExps, Tile, Tiles
from fastclip.ops.tiles.select import tiles_of


class Options(NamedTuple):
    """Everything about S that is no tensor.

    dtype: that of the computation. backend: the implementation. chunk_bytes: 0 is the default.
    exchange, group, sizes: see `Ranks`; empty for a process alone. needs: which inputs want a
    gradient. column_statistics: whether columns have statistics too, those of the first block.
    maxima, means: whether those of rows and columns are wanted. first_negative: columns before it
    are positives only. columns_with_gradient: their number; -1 means all. domains: of a symmetric
    S, the domain of each block. keep_bytes: for exponentials that wait for the backward
    (`kept.py`). positive_groups: whether entries whose ids agree are positives and not left out.
    """

    dtype: torch.dtype
    backend: str
    chunk_bytes: int
    exchange: str
    group: str
    sizes: tuple[int, ...]
    needs: tuple[bool, ...]
    column_statistics: bool
    maxima: bool
    means: bool
    first_negative: int
    columns_with_gradient: int
    domains: tuple[int, ...]
    keep_bytes: int
    positive_groups: bool

    @property
    def ranks(self) -> Ranks | None:
        """The processes that share the batch; None for a process alone."""
        if not self.exchange:
            return None
        return Ranks(self.exchange, self.group, tuple(self.sizes), rank_in(self.group))

    @property
    def parts(self) -> int:
        """How many parts the columns come in."""
        return len(self.sizes) if self.exchange == "ring" else 1


def options(
    dtype: torch.dtype, backend: str, chunk_bytes: int, ranks: Ranks | None, **others: Any
) -> dict[str, Any]:
    """`Options` as keyword arguments; those that are not given have their defaults."""
    found: dict[str, Any] = {
        "dtype": dtype,
        "backend": backend,
        "chunk_bytes": chunk_bytes,
        "exchange": "" if ranks is None else ranks.exchange,
        "group": "" if ranks is None else ranks.group,
        "sizes": () if ranks is None else ranks.sizes,
        "needs": (),
        "column_statistics": False,
        "maxima": False,
        "means": False,
        "first_negative": 0,
        "columns_with_gradient": -1,
        "domains": (),
        "keep_bytes": 0,
        "positive_groups": False,
    }
    return found | others


@dataclass(frozen=True, eq=False)
class Problem:
    """S of one call, inside an operator.

    Row i's positive is own column positive_index[i], or i. Left out of its negatives are the
    positive, columns whose id is the row's, and columns before `first_negative`; where S is
    symmetric, the rows of its own pair. Ids and biases of columns are those of all ranks.

    Biases are stored less their maximum, so they are at most 0. `column_top` is the maximum over
    the columns of all ranks; a row's softmax comes out less by it. `row_top` is that over this
    rank's rows. `bias_spread`: how far the finite ones of both reach down.
    """

    options: Options
    tiles: Tiles
    columns: Columns
    x_ND: Tensor
    y_MD: Tensor
    scale_PP: Tensor
    offset_PP: Tensor | None = None
    positive_index: Tensor | None = None
    row_id: Tensor | None = None
    column_id: Tensor | None = None
    row_bias: Tensor | None = None
    column_bias: Tensor | None = None
    row_top: Tensor | None = None
    column_top: Tensor | None = None
    bias_spread: Tensor | None = None

    @property
    def is_biased(self) -> bool:
        return self.row_bias is not None or self.column_bias is not None

    @property
    def is_symmetric(self) -> bool:
        return len(self.options.domains) > 0

    @property
    def is_triangle(self) -> bool:
        """Whether all of a symmetric S is here, so that each pair of rows is visited once."""
        return self.is_symmetric and not self.options.exchange

    @cached_property
    def domains(self) -> tuple[int, ...]:
        """The domain of each block of columns."""
        return tuple(self.options.domains) or (0,) * len(self.columns.layout.sizes)

    @property
    def rows(self) -> int:
        """The number of rows, of all ranks."""
        return sum(self.options.sizes) or len(self.x_ND)

    @cached_property
    def row_blocks(self) -> list[slice]:
        """The rows of each block."""
        count = len(self.options.domains) or 1
        size = len(self.x_ND) // count
        return [slice(start, start + size) for start in range(0, len(self.x_ND), size)]

    @property
    def paired(self) -> int:
        """The number of columns, from the first on, that have statistics."""
        if self.is_symmetric:
            return self.columns.layout.columns()
        return sum(self.columns.layout.sizes[0]) if self.options.column_statistics else 0

    @property
    def columns_with_gradient(self) -> int:
        total = self.columns.layout.columns()
        # only a process alone has columns without
        alone = not self.options.exchange and self.options.columns_with_gradient >= 0
        return self.options.columns_with_gradient if alone else total

    def segments(self, part: Part) -> list[Segment]:
        """A part's columns that may be negatives."""
        skipped = [max(0, self.options.first_negative - s.column) for s in part.segments]
        return [
            segment._replace(start=segment.start + skip, column=segment.column + skip)
            for segment, skip in zip(part.segments, skipped, strict=True)
            if segment.start + skip < segment.stop
        ]

    def tile(self, x_CD: Tensor, y_SD: Tensor, row: int, block: int, segment: Segment) -> Tile:
        """The tile whose first row is own row `row` of a block, whose columns are a segment's."""
        entry = self.domains[block], self.domains[segment.block]
        offset = None if self.offset_PP is None else self.offset_PP[entry]
        diagonal = self._diagonal(row, block, segment)
        tile = Tile(x_CD, y_SD, self.scale_PP[entry], offset, diagonal)
        rows = slice(row, row + len(x_CD))
        columns = slice(segment.column, segment.column + len(y_SD))
        if self.is_biased:
            tile = tile._replace(
                row_bias_C=None if self.row_bias is None else self.row_bias[rows],
                column_bias_S=None if self.column_bias is None else self.column_bias[columns],
                bias_spread=self.bias_spread,
            )
        if self.row_id is None or self.column_id is None:
            return tile
        return tile._replace(
            row_id_C=self.row_id[rows],
            column_id_S=self.column_id[columns],
            positive_ids=self.options.positive_groups,
        )

    def _diagonal(self, row: int, block: int, segment: Segment) -> int | None:
        """Where in a tile the entries of own pairs are: column less row."""
        # the columns behind the first block of a rectangle are negatives of all rows
        if self.positive_index is not None or (segment.block > 0 and not self.is_symmetric):
            return None
        layout = self.columns.layout
        # numbers of the pairs, over all ranks, that the first row and the first column are of
        row_pair: int = layout.start(0, layout.rank) + row - self.row_blocks[block].start
        return row_pair - (segment.column - layout.start(segment.block, 0))

    def of_all_columns(self, own: LogSumExps) -> LogSumExps:
        """Those of the columns of all ranks, from those of own columns."""
        pairs = self.columns.of_all_ranks(torch.stack(own, dim=1))
        return LogSumExps(*(one.contiguous() for one in pairs.unbind(dim=1)))

    def positives(self) -> Tensor:
        """Each row's positive, among own columns."""
        if self.positive_index is not None:
            return self.y_MD.index_select(0, self.positive_index)
        return self.y_MD[: len(self.x_ND)]


def rectangle(
    options: Options,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
) -> Problem:
    """S of two sides; true captions stand apart from hard negatives where they have statistics."""
    n, m = len(x), len(y)
    tiles = tiles_of(options.backend, options.dtype, options.maxima)
    columns = columns_of(options.ranks, [n, m - n] if options.column_statistics else [m])
    row_id, column_id = row_group, column_group
    if column_id is not None:
        column_id = columns.of_all_ranks(column_id)
    if positive_index is not None:
        row_id, first = positive_index, columns.layout.start(0, columns.layout.rank)
        stop = columns.layout.columns() - first
        column_id = torch.arange(-first, stop, device=row_id.device, dtype=row_id.dtype)
    return Problem(
        options,
        tiles,
        columns,
        x.to(options.dtype),
        y.to(options.dtype),
        away_from_zero(scale.reshape(1, 1), tiles.dtype),
        None if offset is None else offset.reshape(1, 1).to(tiles.dtype),
        positive_index,
        row_id,
        column_id,
    )


def biased(asked: Problem, row_bias: Tensor | None, column_bias: Tensor | None) -> Problem:
    """The same with biases of own rows and columns."""
    dtype, spread = asked.tiles.dtype, asked.scale_PP.new_zeros(())
    if row_bias is not None:
        row_bias, top, depth = _below_top(row_bias.to(dtype))
        asked, spread = replace(asked, row_bias=row_bias, row_top=top), spread + depth
    if column_bias is not None:
        column_bias, top, depth = _below_top(asked.columns.of_all_ranks(column_bias.to(dtype)))
        asked, spread = replace(asked, column_bias=column_bias, column_top=top), spread + depth
    return replace(asked, bias_spread=spread) if asked.is_biased else asked


def _below_top(bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Biases less the greatest, that, and how far the finite ones reach down from it, 0-d.

    -inf, which leaves a line out, stays.
    """
    if not len(bias):
        return bias, bias.new_zeros(()), bias.new_zeros(())
    top = finite(bias.amax())
    bias = (bias - top).contiguous()
    return bias, top, -finite(bias).amin()


def raised(line: Tensor, top: Tensor | None) -> Tensor:
    """Maxima or log-sum-exps with what the biases lack."""
    return line if top is None else line + top


def lowered(line: Tensor, top: Tensor | None) -> Tensor:
    """The same without it again."""
    return line if top is None else line - top


def symmetric(
    options: Options,
    z: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pair_group: Tensor | None = None,
) -> Problem:
    """S among the rows of one tensor, block after block; scale and offset are (P, P).

    Rows of other pairs of a row's group, by an id for each own pair, are no negatives.
    """
    tiles = tiles_of(options.backend, options.dtype, options.maxima)
    count = len(options.domains)
    columns = columns_of(options.ranks, [len(z) // count] * count)
    z = z.to(options.dtype)
    offset = None if offset is None else offset.to(tiles.dtype)
    found = Problem(options, tiles, columns, z, z, away_from_zero(scale, tiles.dtype), offset)
    if pair_group is None:
        return found
    ids = pair_group.repeat(count)
    return replace(found, row_id=ids, column_id=columns.of_all_ranks(ids))


def couples(blocks: int) -> list[tuple[int, int]]:
    """(b, c) with b < c, in the order of the positives of a symmetric S."""
    return [(b, c) for b in range(blocks) for c in range(b + 1, blocks)]


def one_product(x_shape: Sequence[int], y_shape: Sequence[int], options: Options) -> int:
    """The FLOP of one product of this rank's rows with the columns of all."""
    return 2 * x_shape[0] * columns_of_all(y_shape[0], options) * x_shape[1]


def columns_of_all(own: int, options: Options) -> int:
    """The number of columns of all ranks, from that of this one."""
    ranks = options.ranks
    return own if ranks is None else sum(ranks.columns(own))


def collected_shape(own: Tensor, options: Options) -> tuple[int, ...]:
    """The shape of what `Columns.collect` gives."""
    ranks = options.ranks
    if ranks is None or ranks.exchange != "gather":
        return (0,)
    return sum(ranks.columns(own.shape[0])), own.shape[1]
