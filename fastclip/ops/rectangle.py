"""The walk over a rectangular S = scale * X @ Y.T + offset, in chunks of rows.

Memory is O((N + M) D + chunk M), whatever the implementation of the tiles; every reduction runs
in a fixed order, so a shape gives the same bits every time on the same device.

Shape suffixes: N rows, M columns, D width, C rows of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.ops.gemm import add_product, product
from fastclip.ops.tiles import Lines, Running, Tile, Tiles, chunk_rows, chunks, finite, softplus


@dataclass(frozen=True)
class Rectangle:
    """Which entries of S are positives and which are negatives.

    Row i's positive is column positive_index[i], or i + diagonal. Columns before `first` are
    positives only; of the others all are negatives but the row's positive and those of its group.
    With `both`, columns < N have negatives too. Columns from `trainable` on get no gradient.
    """

    rows: int
    columns: int
    both: bool = False
    diagonal: int = 0
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
        diagonal: int | None = row + self.diagonal - column
        if self.positive_index is not None:
            diagonal = None
            row_id = self.positive_index
            column_id = torch.arange(self.columns, device=row_id.device, dtype=row_id.dtype)
        if row_id is None or column_id is None:
            return Tile(x_CD, y_SD, scale, offset, diagonal)
        row_id_C = row_id[row : row + x_CD.shape[0]]
        column_id_S = column_id[column : column + y_SD.shape[0]]
        return Tile(x_CD, y_SD, scale, offset, diagonal, row_id_C, column_id_S)

    @property
    def trained(self) -> int:
        """The first column without gradient, or the number of columns."""
        return self.columns if self.trainable is None else self.trainable

    def segments(self) -> list[tuple[int, int, bool]]:
        """Column ranges, and whether their columns have statistics of their own."""
        if not self.both:
            return [(self.first, self.columns, False)] if self.first < self.columns else []
        ranges = [(0, self.rows, True), (self.rows, self.columns, False)]
        return [segment for segment in ranges if segment[0] < segment[1]]

    def positives(self, y_MD: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The positives of rows [start, stop)."""
        stop = self.rows if stop is None else stop
        if self.positive_index is not None:
            return y_MD.index_select(0, self.positive_index[start:stop])
        return y_MD[start + self.diagonal : stop + self.diagonal]


def statistics(
    tiles: Tiles, x_ND: Tensor, y_MD: Tensor, scale: Tensor, shape: Rectangle, chunk_bytes: int
) -> tuple[Running, Running, Tensor]:
    """Statistics of rows and (with `shape.both`) columns, and the positive logits; 1 product."""
    n = shape.rows
    x_op_ND, y_op_MD = tiles.operand(x_ND), tiles.operand(y_MD)
    scale = scale.reshape(()).to(tiles.dtype)
    rows = Running.of(n, x_ND, tiles.dtype)
    columns = Running.of(n if shape.both else 0, x_ND, tiles.dtype)
    for start, stop in _row_chunks(tiles, x_ND, shape, chunk_bytes):
        for first, last, with_columns in shape.segments():
            tiles.statistics(
                shape.tile(x_op_ND[start:stop], y_op_MD[first:last], scale, None, start, first),
                rows.part(start, stop),
                columns.part(first, last) if with_columns else None,
            )
    positive_N = tiles.row_dot(x_ND, shape.positives(y_MD)).mul_(scale)
    return rows, columns, positive_N


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
    scale: Tensor,
    shape: Rectangle,
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
    x_op_ND, y_op_MD = tiles.operand(x_ND), tiles.operand(y_MD)
    x_grad_ND, y_grad_MD = tiles.gradient_operand(x_op_ND), tiles.gradient_operand(y_op_MD)
    scale = scale.reshape(()).to(tiles.dtype)
    begin, end = _column_range(shape)
    trainable = shape.trained
    means = _Means(x_ND, y_MD, upstream, tiles) if upstream.row_mean is not None else None
    positive_N = upstream.positive * scale

    dx_ND = x_ND.new_empty(x_ND.shape, dtype=dtypes[0]) if need_x else None
    dy_MD = y_MD.new_zeros(y_MD.shape, dtype=tiles.dtype) if need_y else None
    dscales = []
    for start, stop in _row_chunks(tiles, x_ND, shape, chunk_bytes):
        G_CM = tiles.gradient_buffer(stop - start, y_grad_MD[begin:end])
        for first, last, with_columns in shape.segments():
            tile = shape.tile(x_op_ND[start:stop], y_op_MD[first:last], scale, None, start, first)
            columns = None
            if with_columns:
                assert column_lse_N is not None and upstream.column_lse is not None
                columns = Lines(column_lse_N[first:last], upstream.column_lse[first:last])
            rows = Lines(row_lse_N[start:stop], upstream.row_lse[start:stop])
            G_CS = G_CM[:, first - begin : last - begin]
            dscales.append(tiles.gradient(tile, rows, columns, G_CS, need_scale)[0])
        if dx_ND is not None:
            total_CD = x_ND.new_zeros((stop - start, x_ND.shape[1]), dtype=tiles.dtype)
            if begin < end:
                product(G_CM, y_grad_MD[begin:end], out=total_CD)
            if means is not None:
                means.add_to_rows(total_CD, start, stop, scale)
            term = (positive_N[start:stop], shape.positives(y_MD, start, stop))
            tiles.finish(total_CD, [term], dx_ND[start:stop])
        if dy_MD is not None and begin < trainable:
            add_product(
                dy_MD[begin:trainable], G_CM[:, : trainable - begin].T, x_grad_ND[start:stop]
            )

    if dy_MD is not None and means is not None:
        means.add_to_columns(dy_MD, scale)
    dy = (
        None if dy_MD is None else _finish_columns(tiles, dy_MD, x_ND, positive_N, shape, dtypes[1])
    )
    dscale = None
    if need_scale:
        dscale = (upstream.positive * tiles.row_dot(x_ND, shape.positives(y_MD))).sum()
        if means is not None:
            dscale = dscale + means.scale_gradient()
        if dscales:
            dscale = dscale + torch.stack(dscales).sum()
    return dx_ND, dy, dscale


def info_nce(
    tiles: Tiles,
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    shape: Rectangle,
    needs: tuple[bool, bool, bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum over rows of softplus(lse - positive), and its gradients: 3 products in all.

    A chunk holds its rows whole, so their log-sum-exps are known before the next chunk: one
    product serves statistics and gradient. Returns the sum, the rows' margins (positive less the
    greatest negative), and dX, dY, dscale in the accumulator's dtype.
    """
    need_x, need_y, need_scale = needs
    x_op_ND, y_op_MD = tiles.operand(x_ND), tiles.operand(y_MD)
    x_grad_ND, y_grad_MD = tiles.gradient_operand(x_op_ND), tiles.gradient_operand(y_op_MD)
    scale = scale.reshape(()).to(tiles.dtype)
    begin, end = _column_range(shape)
    trainable = shape.trained
    cosine_N = tiles.row_dot(x_ND, shape.positives(y_MD))
    positive_N = cosine_N * scale

    dx_ND = x_ND.new_zeros(x_ND.shape, dtype=tiles.dtype) if need_x else None
    dy_MD = y_MD.new_zeros(y_MD.shape, dtype=tiles.dtype) if need_y else None
    rows = Running.of(shape.rows, x_ND, tiles.dtype)
    dot_N = torch.zeros_like(positive_N)
    any_gradient = need_x or need_y
    for start, stop in _row_chunks(tiles, x_ND, shape, chunk_bytes):
        if begin == end:
            continue
        part = rows.part(start, stop)
        tile = shape.tile(x_op_ND[start:stop], y_op_MD[begin:end], scale, None, start, begin)
        if not any_gradient and not need_scale:
            tiles.statistics(tile, part, None)
            continue
        found, dot_C = tiles.begin_rows(tile)
        part.merge_(found.max, found.sum)
        lse_C = part.lse()
        share_C = torch.exp(found.max - finite(lse_C))
        weight_C = torch.sigmoid(lse_C - positive_N[start:stop])
        dot_N[start:stop] = dot_C * share_C * weight_C
        if not any_gradient:
            continue
        G_CM = tiles.gradient_buffer(stop - start, y_grad_MD[begin:end])
        tiles.end_rows(share_C * weight_C * scale, G_CM)
        if dx_ND is not None:
            product(G_CM, y_grad_MD[begin:end], out=dx_ND[start:stop])
        if dy_MD is not None and begin < trainable:
            add_product(
                dy_MD[begin:trainable], G_CM[:, : trainable - begin].T, x_grad_ND[start:stop]
            )

    lse_N = rows.lse()
    loss_N = softplus(lse_N - positive_N)
    d_positive_N = -torch.sigmoid(lse_N - positive_N)
    if dx_ND is not None:
        tiles.finish(dx_ND, [(d_positive_N * scale, shape.positives(y_MD))], dx_ND)
    dy = None
    if dy_MD is not None:
        dy = _finish_columns(tiles, dy_MD, x_ND, d_positive_N * scale, shape, tiles.dtype)
    dscale = dot_N.sum() + (d_positive_N * cosine_N).sum() if need_scale else None
    return loss_N.sum(), positive_N - rows.max, dx_ND, dy, dscale


def sigmoid(
    tiles: Tiles,
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    upstream_N: Tensor | None,
    shape: Rectangle,
    needs: tuple[bool, bool, bool, bool],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Row sums of the sigmoid loss, and the gradients of sum(upstream * rows): 3 products.

    The gradient of an entry depends on that entry alone, so one walk gives everything. dX, dY,
    dscale and doffset are in the accumulator's dtype; `upstream_N` None means ones.
    """
    need_x, need_y, need_scale, need_offset = needs
    x_op_ND, y_op_MD = tiles.operand(x_ND), tiles.operand(y_MD)
    x_grad_ND, y_grad_MD = tiles.gradient_operand(x_op_ND), tiles.gradient_operand(y_op_MD)
    scale = scale.reshape(()).to(tiles.dtype)
    offset = None if offset is None else offset.reshape(()).to(tiles.dtype)
    cosine_N = tiles.row_dot(x_ND, shape.positives(y_MD))
    weight_N = torch.ones_like(cosine_N) if upstream_N is None else upstream_N

    dx_ND = x_ND.new_empty(x_ND.shape, dtype=tiles.dtype) if need_x else None
    dy_MD = y_MD.new_zeros(y_MD.shape, dtype=tiles.dtype) if need_y else None
    loss_N = torch.empty_like(cosine_N)
    sums = []
    for start, stop in _row_chunks(tiles, x_ND, shape, chunk_bytes):
        G_CM = None
        if any(needs):
            G_CM = tiles.gradient_buffer(stop - start, y_grad_MD)
        tile = shape.tile(x_op_ND[start:stop], y_op_MD, scale, offset, start, 0)
        loss_N[start:stop], *found = tiles.sigmoid(tile, weight_N[start:stop], G_CM)
        sums.append(found)
        if G_CM is None:
            continue
        if dx_ND is not None:
            product(G_CM, y_grad_MD, out=dx_ND[start:stop])
        if dy_MD is not None:
            add_product(dy_MD, G_CM.T, x_grad_ND[start:stop])

    positive_N = cosine_N * scale if offset is None else cosine_N * scale + offset
    loss_N += softplus(-positive_N)
    d_positive_N = -torch.sigmoid(-positive_N) * weight_N
    if dx_ND is not None:
        tiles.finish(dx_ND, [(d_positive_N * scale, shape.positives(y_MD))], dx_ND)
    dy = None
    if dy_MD is not None:
        dy = _finish_columns(tiles, dy_MD, x_ND, d_positive_N * scale, shape, tiles.dtype)
    dscale = doffset = None
    if need_scale:
        dscale = torch.stack([s for s, _ in sums]).sum() + (d_positive_N * cosine_N).sum()
    if need_offset:
        doffset = torch.stack([o for _, o in sums]).sum() + d_positive_N.sum()
    return loss_N, dx_ND, dy, dscale, doffset


def add_rows_(total_MD: Tensor, index_N: Tensor, rows_ND: Tensor) -> Tensor:
    """total[index[i]] += rows[i] in place, in a fixed order even where indices repeat."""
    if total_MD.device.type == "cuda":
        # sorts; index_add would use atomics
        return total_MD.index_put_((index_N,), rows_ND, accumulate=True)
    return total_MD.index_add_(0, index_N, rows_ND)


class _Means:
    """The terms of row and column means (label smoothing): S averaged over columns and rows."""

    def __init__(self, x_ND: Tensor, y_MD: Tensor, upstream: Upstream, tiles: Tiles) -> None:
        assert upstream.row_mean is not None and upstream.column_mean is not None
        self.row_N, self.column_N = upstream.row_mean, upstream.column_mean
        n, m = x_ND.shape[0], y_MD.shape[0]
        dtype = tiles.dtype
        self.x_mean_D = x_ND.mean(dim=0, dtype=dtype)
        self.y_mean_D = y_MD.mean(dim=0, dtype=dtype)
        self.x_sum_D = torch.mv(x_ND.to(dtype).T, self.row_N)
        self.y_sum_D = torch.mv(y_MD[:n].to(dtype).T, self.column_N)
        self.n, self.m = n, m

    def add_to_rows(self, dx_CD: Tensor, start: int, stop: int, scale: Tensor) -> None:
        dx_CD.addcmul_((self.row_N[start:stop] * scale)[:, None], self.y_mean_D)
        dx_CD.add_(self.y_sum_D * scale, alpha=1 / self.n)

    def add_to_columns(self, dy_MD: Tensor, scale: Tensor) -> None:
        dy_MD[: self.n].addcmul_((self.column_N * scale)[:, None], self.x_mean_D)
        dy_MD.add_(self.x_sum_D * scale, alpha=1 / self.m)

    def scale_gradient(self) -> Tensor:
        return torch.dot(self.x_sum_D, self.y_mean_D) + torch.dot(self.y_sum_D, self.x_mean_D)


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
    first, last = shape.diagonal, shape.diagonal + shape.rows
    out_MD = dy_MD if dy_MD.dtype == dtype else torch.empty_like(dy_MD, dtype=dtype)
    if out_MD is not dy_MD:
        out_MD[:first] = dy_MD[:first]
        out_MD[last:] = dy_MD[last:]
    tiles.finish(dy_MD[first:last], [(coefficient_N, x_ND)], out_MD[first:last])
    return out_MD


def _column_range(shape: Rectangle) -> tuple[int, int]:
    return (0 if shape.both else shape.first), shape.columns


def _row_chunks(
    tiles: Tiles, x_ND: Tensor, shape: Rectangle, chunk_bytes: int
) -> Iterator[tuple[int, int]]:
    device = x_ND.device.type
    size = chunk_rows(shape.rows, shape.columns, tiles.itemsize, chunk_bytes, device)
    yield from chunks(0, shape.rows, size)
