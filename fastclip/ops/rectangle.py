"""The walk over a rectangular S = scale * X @ Y.T + offset, in chunks of rows.

Memory is O((N + M) D + chunk M), whatever the implementation of the tiles; every reduction runs
in a fixed order, so a shape gives the same bits every time on the same device. Rows are this
process's; columns come in parts from `columns.py`, from this process or from all.

Shape suffixes: N rows, M own columns, D width; P columns of a part, Q of them in G, S of a
segment; C rows of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastclip.ops.columns import Columns, Part, Segment, exchange_dtype
from fastclip.ops.gemm import add_product, product
from fastclip.ops.tiles import (
    Lines,
    Running,
    Tile,
    Tiles,
    away_from_zero,
    chunk_rows,
    chunks,
    finished,
    finished_room,
    finite,
    softplus,
)

LinesT = TypeVar("LinesT", Lines, Running)


@dataclass(frozen=True)
class Rectangle:
    """Which entries of S are positives and which are negatives.

    Row i's positive is this process's own column positive_index[i], or i; own columns begin at
    column `own` of all. Columns before `first` are positives only; of the others all are negatives
    but the row's positive and those of its group. The first `paired` columns have statistics of
    their own. Columns from `trainable` on get no gradient.
    """

    rows: int
    columns: int
    paired: int = 0
    own: int = 0
    positive_index: Tensor | None = None
    row_group: Tensor | None = None
    column_group: Tensor | None = None
    first: int = 0
    trainable: int | None = None

    def tile(
        self,
        x_CD: Tensor,
        y_SD: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        row: int,
        column: int,
    ) -> Tile:
        """The tile whose first entry is (row, column)."""
        row_id, column_id = self.row_group, self.column_group
        diagonal: int | None = row + self.own - column
        if self.positive_index is not None:
            diagonal = None
            row_id = self.positive_index
            column_id = torch.arange(
                -self.own, self.columns - self.own, device=row_id.device, dtype=row_id.dtype
            )
        if row_id is None or column_id is None:
            return Tile(x_CD, y_SD, scale, offset, diagonal)
        row_id_C = row_id[row : row + x_CD.shape[0]]
        column_id_S = column_id[column : column + y_SD.shape[0]]
        return Tile(x_CD, y_SD, scale, offset, diagonal, row_id_C, column_id_S)

    @property
    def trained(self) -> int:
        """The first column without gradient, or the number of columns."""
        return self.columns if self.trainable is None else self.trainable

    def segments(self, part: Part) -> list[Segment]:
        """A part's columns that may be negatives."""
        skipped = [max(0, self.first - segment.column) for segment in part.segments]
        return [
            segment._replace(start=segment.start + skip, column=segment.column + skip)
            for segment, skip in zip(part.segments, skipped, strict=True)
            if segment.start + skip < segment.stop
        ]

    def positives(self, y_MD: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The positives of rows [start, stop), among this process's own columns."""
        stop = self.rows if stop is None else stop
        if self.positive_index is not None:
            return y_MD.index_select(0, self.positive_index[start:stop])
        return y_MD[start:stop]


def statistics(
    tiles: Tiles,
    x_ND: Tensor,
    y_MD: Tensor,
    collected: Tensor,
    scale: Tensor,
    shape: Rectangle,
    columns: Columns,
    chunk_bytes: int,
) -> tuple[Running, Running, Tensor]:
    """Statistics of rows and of own paired columns, and the positive logits; 1 product."""
    x_op_ND = tiles.operand(x_ND)
    scale = away_from_zero(scale.reshape(()), tiles.dtype)
    row_lines = Running.of(shape.rows, x_ND, tiles.dtype)
    column_lines = Running.of(shape.paired, x_ND, tiles.dtype)
    for part in columns.parts(y_MD, collected):
        y_op_PD = tiles.operand(part.features)
        for start, stop in _row_chunks(tiles, x_ND, y_op_PD, chunk_bytes):
            for segment in shape.segments(part):
                y_op_SD = y_op_PD[segment.start : segment.stop]
                tiles.statistics(
                    shape.tile(x_op_ND[start:stop], y_op_SD, scale, None, start, segment.column),
                    row_lines.part(start, stop),
                    _paired(column_lines, segment, shape),
                )
    positive_N = tiles.row_dot(x_ND, shape.positives(y_MD)).mul_(scale)
    if shape.paired:
        column_lines = columns.own_lines(column_lines)
    return row_lines, column_lines, positive_N


@dataclass
class Upstream:
    """Gradients of the statistics: log-sum-exps, positives, and means where there are any."""

    row_lse: Tensor
    column_lse: Tensor | None
    positive: Tensor
    row_mean: Tensor | None = None
    column_mean: Tensor | None = None


def statistics_gradient(
    tiles: Tiles,
    x_ND: Tensor,
    y_MD: Tensor,
    collected: Tensor,
    scale: Tensor,
    shape: Rectangle,
    columns: Columns,
    row_lse_N: Tensor,
    column_lse_N: Tensor | None,
    upstream: Upstream,
    needs: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    chunk_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX and dY in the given dtypes and dscale; at most 3 products of N x M x D.

    With upstream gradients a (row_lse) and b (column_lse), the gradient of a negative's logit is
    G_ij = a_i exp(S_ij - row_lse_i) + b_j exp(S_ij - column_lse_j); positives and means are added
    afterwards, outside the product.
    """
    need_x, need_y, need_scale = needs
    x_op_ND = tiles.operand(x_ND)
    x_grad_ND = tiles.gradient_operand(x_op_ND)
    scale = away_from_zero(scale.reshape(()), tiles.dtype)
    mean_terms = None
    if upstream.row_mean is not None:
        mean_terms = _Means(x_ND, y_MD, upstream, tiles, columns)
    positive_N = upstream.positive * scale
    column_lines = None
    if column_lse_N is not None and upstream.column_lse is not None:
        pairs = columns.all_lines(torch.stack((column_lse_N, upstream.column_lse), dim=1))
        column_lines = Lines(*(line.contiguous() for line in pairs.unbind(dim=1)))

    walk = _Gradient(tiles, x_ND, shape, columns, need_x, need_y)
    dscales = []
    for part in columns.parts(y_MD, collected):
        y_op_PD = tiles.operand(part.features)
        walk.begin(part, tiles.gradient_operand(y_op_PD))
        for start, stop in _row_chunks(tiles, x_ND, y_op_PD, chunk_bytes):
            G_CP = walk.room(start, stop)
            rows = Lines(row_lse_N[start:stop], upstream.row_lse[start:stop])
            for segment in walk.segments:
                y_op_SD = y_op_PD[segment.start : segment.stop]
                tile = shape.tile(x_op_ND[start:stop], y_op_SD, scale, None, start, segment.column)
                dscale, _ = tiles.gradient(
                    tile,
                    rows,
                    _paired(column_lines, segment, shape),
                    walk.of_segment(G_CP, segment),
                    need_scale,
                )
                dscales.append(dscale)
            walk.add(G_CP, x_grad_ND, start, stop)
        walk.end(part, exchange_dtype(y_MD.dtype, scaled=True))

    dx_ND = walk.dx_ND
    dy_MD = columns.own_gradient() if need_y else None
    if mean_terms is not None:
        if dx_ND is not None:
            mean_terms.add_to_rows(dx_ND, scale)
        if dy_MD is not None:
            mean_terms.add_to_columns(dy_MD, scale)
    if dx_ND is not None:
        dx_ND = finished(tiles, dx_ND, [(positive_N, shape.positives(y_MD))], dtypes[0])
    if dy_MD is not None:
        dy_MD = _finish_columns(tiles, dy_MD, x_ND, positive_N, shape, dtypes[1])
    total_scale = None
    if need_scale:
        total_scale = (upstream.positive * tiles.row_dot(x_ND, shape.positives(y_MD))).sum()
        if mean_terms is not None:
            total_scale = total_scale + mean_terms.scale_gradient()
        if dscales:
            total_scale = total_scale + torch.stack(dscales).sum()
    return dx_ND, dy_MD, total_scale


def info_nce(
    tiles: Tiles,
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    shape: Rectangle,
    columns: Columns,
    needs: tuple[bool, bool, bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum over rows of softplus(lse - positive), and its gradients: 3 products in all.

    A chunk holds its rows whole (all columns come as one part), so their log-sum-exps are known
    before the next chunk: one product serves statistics and gradient. Returns the sum, the rows'
    margins (positive less the greatest negative), and dX, dY, dscale in the accumulator's dtype.
    """
    need_x, need_y, need_scale = needs
    x_op_ND = tiles.operand(x_ND)
    x_grad_ND = tiles.gradient_operand(x_op_ND)
    scale = away_from_zero(scale.reshape(()), tiles.dtype)
    cosine_N = tiles.row_dot(x_ND, shape.positives(y_MD))
    positive_N = cosine_N * scale

    rows = Running.of(shape.rows, x_ND, tiles.dtype)
    dot_N = torch.zeros_like(positive_N)
    (part,) = columns.parts(y_MD, columns.collect(y_MD))
    y_op_PD = tiles.operand(part.features)
    walk = _Gradient(tiles, x_ND, shape, columns, need_x, need_y)
    walk.begin(part, tiles.gradient_operand(y_op_PD))
    for start, stop in _row_chunks(tiles, x_ND, y_op_PD, chunk_bytes):
        for segment in walk.segments:
            line = rows.part(start, stop)
            y_op_SD = y_op_PD[segment.start : segment.stop]
            tile = shape.tile(x_op_ND[start:stop], y_op_SD, scale, None, start, segment.column)
            if not any(needs):
                tiles.statistics(tile, line, None)
                continue
            found, dot_C = tiles.begin_rows(tile)
            line.merge_(found.max, found.sum)
            lse_C = line.lse()
            share_C = torch.exp(found.max - finite(lse_C))
            weight_C = torch.sigmoid(lse_C - positive_N[start:stop])
            dot_N[start:stop] = dot_C * share_C * weight_C
            if need_x or need_y:
                G_CP = walk.room(start, stop)
                tiles.end_rows(share_C * weight_C * scale, G_CP)
                walk.add(G_CP, x_grad_ND, start, stop)
    walk.end(part, exchange_dtype(y_MD.dtype, scaled=False))

    lse_N = rows.lse()
    loss_N = softplus(lse_N - positive_N)
    d_positive_N = -torch.sigmoid(lse_N - positive_N)
    dx_ND, dy_MD, dscale = walk.dx_ND, None, None
    if dx_ND is not None:
        tiles.finish(dx_ND, [(d_positive_N * scale, shape.positives(y_MD))], dx_ND)
    if need_y:
        dy_MD = _finish_columns(
            tiles, columns.own_gradient(), x_ND, d_positive_N * scale, shape, tiles.dtype
        )
    if need_scale:
        dscale = dot_N.sum() + (d_positive_N * cosine_N).sum()
    return loss_N.sum(), positive_N - rows.max, dx_ND, dy_MD, dscale


def sigmoid(
    tiles: Tiles,
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    upstream_N: Tensor | None,
    shape: Rectangle,
    columns: Columns,
    needs: tuple[bool, bool, bool, bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Row sums of the sigmoid loss, and the gradients of sum(upstream * rows): 3 products.

    The gradient of an entry depends on that entry alone, so one walk gives everything. dX, dY,
    dscale and doffset are in the accumulator's dtype; `upstream_N` None means ones.
    """
    need_x, need_y, need_scale, need_offset = needs
    x_op_ND = tiles.operand(x_ND)
    x_grad_ND = tiles.gradient_operand(x_op_ND)
    scale = away_from_zero(scale.reshape(()), tiles.dtype)
    offset = None if offset is None else offset.reshape(()).to(tiles.dtype)
    cosine_N = tiles.row_dot(x_ND, shape.positives(y_MD))
    weight_N = torch.ones_like(cosine_N) if upstream_N is None else upstream_N

    positive_N = cosine_N * scale if offset is None else cosine_N * scale + offset
    loss_N = softplus(-positive_N)
    sums = []
    walk = _Gradient(tiles, x_ND, shape, columns, need_x, need_y)
    for part in columns.parts(y_MD, columns.collect(y_MD)):
        y_op_PD = tiles.operand(part.features)
        walk.begin(part, tiles.gradient_operand(y_op_PD))
        for start, stop in _row_chunks(tiles, x_ND, y_op_PD, chunk_bytes):
            G_CP = walk.room(start, stop) if any(needs) else None
            (segment,) = walk.segments
            tile = shape.tile(x_op_ND[start:stop], y_op_PD, scale, offset, start, segment.column)
            row_C, *found = tiles.sigmoid(tile, weight_N[start:stop], G_CP)
            loss_N[start:stop] += row_C
            sums.append(found)
            if G_CP is not None:
                walk.add(G_CP, x_grad_ND, start, stop)
        walk.end(part, exchange_dtype(y_MD.dtype, scaled=upstream_N is not None))

    d_positive_N = -torch.sigmoid(-positive_N) * weight_N
    dx_ND, dy_MD, dscale, doffset = walk.dx_ND, None, None, None
    if dx_ND is not None:
        tiles.finish(dx_ND, [(d_positive_N * scale, shape.positives(y_MD))], dx_ND)
    if need_y:
        dy_MD = _finish_columns(
            tiles, columns.own_gradient(), x_ND, d_positive_N * scale, shape, tiles.dtype
        )
    if need_scale:
        dscale = torch.stack([s for s, _ in sums]).sum() + (d_positive_N * cosine_N).sum()
    if need_offset:
        doffset = torch.stack([o for _, o in sums]).sum() + d_positive_N.sum()
    return loss_N, dx_ND, dy_MD, dscale, doffset


def add_rows_(total_MD: Tensor, index_N: Tensor, rows_ND: Tensor) -> Tensor:
    """total[index[i]] += rows[i] in place, in a fixed order even where indices repeat."""
    if total_MD.device.type == "cuda":
        # sorts; index_add would use atomics
        return total_MD.index_put_((index_N,), rows_ND, accumulate=True)
    return total_MD.index_add_(0, index_N, rows_ND)


class _Gradient:
    """The products with G of a walk: dX over all parts, and dY of each, given to its owner."""

    def __init__(
        self,
        tiles: Tiles,
        x_ND: Tensor,
        shape: Rectangle,
        columns: Columns,
        need_x: bool,
        need_y: bool,
    ) -> None:
        self.tiles, self.shape, self.columns, self.need_y = tiles, shape, columns, need_y
        self.dx_ND = x_ND.new_zeros(x_ND.shape, dtype=tiles.dtype) if need_x else None
        self._first = True

    def begin(self, part: Part, y_grad_PD: Tensor) -> None:
        """The products to come are with this part, whose features enter them as `y_grad_PD`."""
        self.segments = self.shape.segments(part)
        # G covers the columns from the first to the last that may be a negative
        self._from = self.segments[0].start if self.segments else len(y_grad_PD)
        self._y_grad_QD = y_grad_PD[self._from :]
        # only a process alone has columns without gradient
        self._trained = min(self.shape.trained, len(y_grad_PD))
        self._dy_PD = None
        if self.need_y:
            self._dy_PD = y_grad_PD.new_zeros(y_grad_PD.shape, dtype=self.tiles.dtype)

    def room(self, start: int, stop: int) -> Tensor:
        """G of rows [start, stop)."""
        return self.tiles.gradient_buffer(stop - start, self._y_grad_QD)

    def of_segment(self, G_CQ: Tensor, segment: Segment) -> Tensor:
        """The columns of `room` that are the segment's."""
        return G_CQ[:, segment.start - self._from : segment.stop - self._from]

    def add(self, G_CQ: Tensor, x_grad_ND: Tensor, start: int, stop: int) -> None:
        """Add the products with G of rows [start, stop)."""
        if self.dx_ND is not None and self.segments:
            if self._first:
                product(G_CQ, self._y_grad_QD, out=self.dx_ND[start:stop])
            else:
                add_product(self.dx_ND[start:stop], G_CQ, self._y_grad_QD)
        if self._dy_PD is not None and self._from < self._trained:
            add_product(
                self._dy_PD[self._from : self._trained],
                G_CQ[:, : self._trained - self._from].T,
                x_grad_ND[start:stop],
            )

    def end(self, part: Part, dtype: torch.dtype) -> None:
        """Give the part's gradient to its owner, in `dtype` if it travels."""
        self._first = False
        if self._dy_PD is not None:
            self.columns.give(part, self._dy_PD, dtype)


class _Means:
    """The terms of row and column means (label smoothing): S averaged over columns and rows."""

    def __init__(
        self, x_ND: Tensor, y_MD: Tensor, upstream: Upstream, tiles: Tiles, columns: Columns
    ) -> None:
        assert upstream.row_mean is not None and upstream.column_mean is not None
        self.row_N, self.column_N = upstream.row_mean, upstream.column_mean
        dtype = tiles.dtype
        n = x_ND.shape[0]
        self.x_mean_D, self.y_mean_D = means(x_ND, y_MD, columns, dtype)
        # over this rank's own rows and columns
        self.x_sum_D = torch.mv(x_ND.to(dtype).T, self.row_N)
        self.y_sum_D = torch.mv(y_MD[:n].to(dtype).T, self.column_N)
        everyone = columns.sum(torch.stack((self.x_sum_D, self.y_sum_D)))
        self.x_total_D, self.y_total_D = everyone
        self.n, self.m = sum(columns.layout.sizes[0]), columns.layout.columns()

    def add_to_rows(self, dx_ND: Tensor, scale: Tensor) -> None:
        dx_ND.addcmul_((self.row_N * scale)[:, None], self.y_mean_D)
        dx_ND.add_(self.y_total_D * scale, alpha=1 / self.n)

    def add_to_columns(self, dy_MD: Tensor, scale: Tensor) -> None:
        own = len(self.column_N)
        dy_MD[:own].addcmul_((self.column_N * scale)[:, None], self.x_mean_D)
        dy_MD.add_(self.x_total_D * scale, alpha=1 / self.m)

    def scale_gradient(self) -> Tensor:
        return torch.dot(self.x_sum_D, self.y_mean_D) + torch.dot(self.y_sum_D, self.x_mean_D)


def means(
    x_ND: Tensor, y_MD: Tensor, columns: Columns, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The means of all rows and of all columns, (D,) each."""
    sums = torch.stack([features.sum(dim=0, dtype=dtype) for features in (x_ND, y_MD)])
    x_D, y_D = columns.sum(sums)
    return x_D / sum(columns.layout.sizes[0]), y_D / columns.layout.columns()


def _paired(lines: LinesT | None, segment: Segment, shape: Rectangle) -> LinesT | None:
    """The lines of a segment's columns, where these have statistics."""
    if lines is None or segment.column >= shape.paired:
        return None
    part = slice(segment.column, segment.column + segment.stop - segment.start)
    return type(lines)(*(line[part] for line in lines))


def _finish_columns(
    tiles: Tiles,
    dy_MD: Tensor,
    x_ND: Tensor,
    coefficient_N: Tensor,
    shape: Rectangle,
    dtype: torch.dtype,
) -> Tensor:
    """Add coefficient_i * x_i to each row's positive column and cast."""
    if shape.positive_index is not None:
        # no gradient where none is wanted, even for a positive
        coefficient_N = coefficient_N * (shape.positive_index < shape.trained)
        add_rows_(dy_MD, shape.positive_index, coefficient_N[:, None] * x_ND.to(dy_MD.dtype))
        return dy_MD.to(dtype)
    # nor here: the row's own column may be one of those
    last = min(shape.rows, shape.trained)
    out_MD = finished_room(dy_MD, dtype)
    if out_MD is not dy_MD:
        out_MD[last:] = dy_MD[last:]
    tiles.finish(dy_MD[:last], [(coefficient_N[:last], x_ND[:last])], out_MD[:last])
    return out_MD


def _row_chunks(
    tiles: Tiles, x_ND: Tensor, y_PD: Tensor, chunk_bytes: int
) -> Iterator[tuple[int, int]]:
    n, device = x_ND.shape[0], x_ND.device.type
    size = chunk_rows(n, y_PD.shape[0], tiles.itemsize, chunk_bytes, device)
    yield from chunks(0, n, size)
