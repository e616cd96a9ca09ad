"""The loops over S that the operators are made of; memory is O((N + M) D + chunk M).

    statistics   of rows and columns, from one product; on a triangle half a product
    gradient     dX and dY from the log-sum-exps: a product for each, and S again unless the
                 statistics kept its exponentials (`kept.py`)
    info_nce     both at once where a chunk holds its rows whole: three products in all
    sigmoid      the sigmoid loss and its gradients: three products in all

Every reduction runs in a fixed order, so that a shape's results are bitwise reproducible on a
device.

Shape suffixes: N rows, M own columns, D width; P columns of a part, Q of them in G; C rows of one
chunk.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastclip.ops.columns import Part, exchange_dtype
from fastclip.ops.gemm import add_product, product
from fastclip.ops.kept import (
    Kept,
    Rooms,
    anchor_of,
    factors,
    keeps_products,
    room_to_keep,
    sums_in_range,
)
from fastclip.ops.numerics import finite, softplus
from fastclip.ops.problem import Problem
from fastclip.ops.schedule import Chunk, Visit, visit
from fastclip.ops.tiles.base import (
    BiasingTiles,
    FlaggingTiles,
    KeepingTiles,
    LogSumExps,
    SoftmaxStats,
    finished_room,
)

OnPart = Callable[[Part], None]


class Gradients(NamedTuple):
    """dX and dY, unfinished: without the terms of positives, in the accumulator's dtype.

    scalars: of each visit the sums of G * cos and of G. biases: the gradients by own rows' biases,
    and what own rows make of that by the columns of all ranks; empty where there are none.
    """

    x: Tensor | None
    y: Tensor | None
    scalars: list[tuple[Visit, Tensor, Tensor]]
    biases: tuple[Tensor, ...] = ()

    def scale(self) -> Tensor | float:
        """The gradient of the one scale, unfinished."""
        found = [dot for _, dot, _ in self.scalars]
        return torch.stack(found).sum() if found else 0.0

    def tables(self, like_PP: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the scales and offsets by domain pair, (P, P), unfinished.

        An entry (p, q) has what was visited with domain p in the row's place.
        """
        scale_PP, offset_PP = torch.zeros_like(like_PP), torch.zeros_like(like_PP)
        for seen, dot, total in self.scalars:
            share = 0.5 if seen.twice else 1.0
            scale_PP[seen.domains] += share * dot
            offset_PP[seen.domains] += share * total
        return scale_PP, offset_PP


def statistics(
    problem: Problem, collected: Tensor, on_part: OnPart = lambda part: None
) -> tuple[SoftmaxStats, SoftmaxStats, Kept]:
    """Those of rows, and of the columns that have their own, and the exponentials that are kept.

    `on_part` is called with each part.
    """
    tiles, x_ND = problem.tiles, problem.x_ND
    kept = room_to_keep(problem)
    anchor = anchor_of(problem) if kept.entries.numel() and not kept.by_tile else None
    rooms = kept.rooms(problem.options)
    x_op_ND = tiles.operand(x_ND)
    rows = SoftmaxStats.empty(len(x_ND), x_ND, tiles.dtype)
    columns = rows
    if not problem.is_symmetric:
        columns = SoftmaxStats.empty(problem.paired, x_ND, tiles.dtype)
    for index, part in enumerate(problem.columns.parts(problem.y_MD, collected)):
        on_part(part)
        y_op_PD = x_op_ND if part.features is x_ND else tiles.operand(part.features)
        operands = x_op_ND, y_op_PD
        if anchor is not None and _exponentials(
            problem, part, operands, anchor, rooms, rows, columns
        ):
            kept.anchors[index] = anchor
            continue
        for chunk in visit(problem, part, *operands):
            E_CQ = rooms.next(chunk, len(y_op_PD)) if kept.by_tile else None
            if E_CQ is not None and keeps_products(problem.options):
                chunk, E_CQ = _with_products(chunk, E_CQ), None
            for tile, _, seen, in_G, _, twice in chunk.visits:
                of_columns = None if seen is None or twice else columns.part(seen)
                running = rows.part(chunk.rows), of_columns
                if E_CQ is None:
                    tiles.statistics(tile, *running)
                else:
                    flagging = cast(FlaggingTiles, tiles)
                    flagging.statistics_and_exponentials(tile, *running, E_CQ[:, in_G])
    return rows, columns, kept


def _exponentials(
    problem: Problem,
    part: Part,
    operands: tuple[Tensor, Tensor],
    anchor: Tensor,
    rooms: Rooms,
    rows: SoftmaxStats,
    columns: SoftmaxStats,
) -> bool:
    """Keep a part's exponentials and merge its sums; False, and nothing merged, out of range."""
    tiles = cast(KeepingTiles, problem.tiles)
    row_sum = torch.zeros_like(rows.sum)
    column_sum = row_sum if columns is rows else torch.zeros_like(columns.sum)
    covered = set()
    for chunk in visit(problem, part, *operands):
        E_CQ = rooms.next(chunk, len(operands[1]))
        for tile, _, seen, in_G, _, twice in chunk.visits:
            of_columns = None
            if seen is not None and not twice:
                of_columns = column_sum[seen]
                covered.add((seen.start, seen.stop))
            tiles.exponentials(tile, anchor, row_sum[chunk.rows], of_columns, E_CQ[:, in_G])
    found = [(rows, row_sum)]
    if columns is not rows:
        found += [(columns.part(slice(*c)), column_sum[slice(*c)]) for c in sorted(covered)]
    if not all(sums_in_range(total) for _, total in found):
        return False
    for running, total in found:
        running.merge_(anchor, total)
    return True


def gradient(
    problem: Problem,
    collected: Tensor,
    kept: Kept,
    rows: LogSumExps,
    columns: LogSumExps | None,
    needs: tuple[bool, bool, bool],
    on_part: OnPart = lambda part: None,
) -> Gradients:
    """The gradients of X, Y and the scalars; three products, two where S was kept.

    With upstream gradients a (of row log-sum-exps) and b (of columns'), the gradient of a
    negative's logit is G_ij = a_i exp(S_ij - row_lse_i) + b_j exp(S_ij - column_lse_j).

    Args:
        problem: S.
        collected: what the forward kept of other ranks' columns.
        kept: what it kept of S.
        rows: of own rows.
        columns: of all ranks' columns.
        needs: which gradients; of a symmetric S the first two are one.
        on_part: called with each part.
    """
    tiles, x_ND = problem.tiles, problem.x_ND
    x_op_ND = tiles.operand(x_ND)
    products = _Products(problem, x_op_ND, needs[0], needs[1])
    scalars: list[tuple[Visit, Tensor, Tensor]] = []
    biases: tuple[Tensor, ...] = ()
    if problem.is_biased:
        sizes = len(x_ND), problem.columns.layout.columns()
        biases = tuple(x_ND.new_zeros(size, dtype=tiles.dtype) for size in sizes)
    rooms, given = kept.rooms(problem.options), factors(problem, kept, rows, columns)
    usable = kept.anchors.isfinite().tolist() if given is not None else []
    for index, part in enumerate(problem.columns.parts(problem.y_MD, collected)):
        on_part(part)
        y_op_PD = x_op_ND if part.features is x_ND else tiles.operand(part.features)
        products.begin(part, y_op_PD)
        for chunk in visit(problem, part, x_op_ND, y_op_PD):
            G_CQ = products.room(chunk)
            totals = None
            if given is not None or kept.by_tile:
                E_CQ = rooms.next(chunk, len(y_op_PD))
                if keeps_products(problem.options):
                    chunk = _with_products(chunk, E_CQ)
                elif given is None:
                    totals = _weigh_by_tile(problem, chunk, E_CQ, rows, columns, G_CQ, biases)
                elif usable[index]:
                    totals = _weigh(problem, chunk, E_CQ, *given, G_CQ, biases)
            if totals is not None:
                if needs[2]:
                    scalars += zip(
                        chunk.visits, products.add_with_dots(G_CQ, chunk), totals, strict=True
                    )
                else:
                    products.add(G_CQ, chunk)
                continue
            for seen in chunk.visits:
                dot, total = tiles.gradient(
                    seen.tile,
                    rows.part(chunk.rows),
                    None if columns is None or seen.columns is None else columns.part(seen.columns),
                    G_CQ[:, seen.in_G],
                    needs[2],
                )
                _add_bias_sums(problem, chunk, seen, biases)
                if needs[2]:
                    scalars.append((seen, dot, total))
            products.add(G_CQ, chunk)
        products.end(part, exchange_dtype(problem.options.dtype, scaled=True))
    return Gradients(*products.totals(), scalars, biases)


def _add_bias_sums(problem: Problem, chunk: Chunk, seen: Visit, biases: tuple[Tensor, ...]) -> None:
    """Add what a tile has found of the biases' gradients."""
    if not biases:
        return
    by_row, by_column = cast(BiasingTiles, problem.tiles).bias_sums
    if by_row is not None:
        biases[0][chunk.rows] += by_row
    if by_column is not None:
        biases[1][seen.place] += by_column


def _with_products(chunk: Chunk, room_CQ: Tensor) -> Chunk:
    """A chunk whose tiles have their products in this room."""
    visits = [
        seen._replace(tile=seen.tile._replace(products_CS=room_CQ[:, seen.in_G]))
        for seen in chunk.visits
    ]
    return chunk._replace(visits=visits)


def _weigh(
    problem: Problem,
    chunk: Chunk,
    E_CQ: Tensor,
    u_N: Tensor,
    v_M: Tensor | None,
    G_CQ: Tensor,
    biases: tuple[Tensor, ...],
) -> list[Tensor]:
    """G of a chunk from what was kept of it; of each visit the sum of G, if offsets want it."""
    if biases:
        for seen in chunk.visits:
            v_S = None if v_M is None or seen.columns is None else v_M[seen.columns]
            place = E_CQ[:, seen.in_G], seen.tile, u_N[chunk.rows], v_S, G_CQ[:, seen.in_G]
            cast(KeepingTiles, problem.tiles).weigh_biased(*place)
            _add_bias_sums(problem, chunk, seen, biases)
        return [G_CQ.new_zeros(()) for _ in chunk.visits]
    tiles = cast(KeepingTiles, problem.tiles)
    return [
        tiles.weigh(
            E_CQ[:, seen.in_G],
            seen.tile.scale,
            u_N[chunk.rows],
            None if v_M is None or seen.columns is None else v_M[seen.columns],
            G_CQ[:, seen.in_G],
            problem.offset_PP is not None,
        )
        for seen in chunk.visits
    ]


def _weigh_by_tile(
    problem: Problem,
    chunk: Chunk,
    E_CQ: Tensor,
    rows: LogSumExps,
    columns: LogSumExps | None,
    G_CQ: Tensor,
    biases: tuple[Tensor, ...],
) -> list[Tensor]:
    """The same where the device decides which of it serves."""
    tiles, totals = cast(FlaggingTiles, problem.tiles), []
    for seen in chunk.visits:
        total = tiles.gradient_of_exponentials(
            seen.tile,
            rows.part(chunk.rows),
            None if columns is None or seen.columns is None else columns.part(seen.columns),
            E_CQ[:, seen.in_G],
            G_CQ[:, seen.in_G],
            problem.offset_PP is not None,
        )
        totals.append(total)
        _add_bias_sums(problem, chunk, seen, biases)
    return totals


def info_nce(
    problem: Problem, needs: tuple[bool, bool, bool], weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Each row's softplus(lse - positive), and the gradients of their sum: 3 products in all.

    A chunk holds its rows whole (all columns come as one part), so their log-sum-exps are known
    before the next chunk: one product serves statistics and gradient. Returns the losses, the rows'
    margins (positive less the greatest negative), and dX, dY, dscale in the accumulator's dtype, of
    a sum with `weights_N`, None for ones.
    """
    tiles, x_ND, y_MD = problem.tiles, problem.x_ND, problem.y_MD
    scale = problem.scale_PP[0, 0]
    x_op_ND = tiles.operand(x_ND)
    products = _Products(problem, x_op_ND, needs[0], needs[1])
    cosine_N = tiles.row_dot(x_ND, problem.positives())
    positive_N = cosine_N * scale

    rows = SoftmaxStats.empty(len(x_ND), x_ND, tiles.dtype)
    dot_N = torch.zeros_like(positive_N)
    (part,) = problem.columns.parts(y_MD, problem.columns.collect(y_MD))
    y_op_PD = tiles.operand(part.features)
    products.begin(part, y_op_PD)
    for chunk in visit(problem, part, x_op_ND, y_op_PD):
        of_chunk, own = rows.part(chunk.rows), chunk.rows
        for seen in chunk.visits:
            if not any(needs):
                tiles.statistics(seen.tile, of_chunk, None)
                continue
            found, dot_C = tiles.begin_rows(seen.tile)
            of_chunk.merge_(found.max, found.sum)
            lse_C = of_chunk.lse()
            share_C = torch.exp(found.max - finite(lse_C))
            weight_C = torch.sigmoid(lse_C - positive_N[own])
            if weights_N is not None:
                weight_C *= weights_N[own]
            dot_N[own] = dot_C * share_C * weight_C
            if needs[0] or needs[1]:
                G_CQ = products.room(chunk)
                tiles.end_rows(share_C * weight_C * scale, G_CQ)
                products.add(G_CQ, chunk)
    products.end(part, exchange_dtype(y_MD.dtype, scaled=False))

    lse_N = rows.lse()
    loss_N = softplus(lse_N - positive_N)
    d_positive_N = -torch.sigmoid(lse_N - positive_N)
    if weights_N is not None:
        d_positive_N *= weights_N
    dx_ND, dy_MD = add_positives(problem, *products.totals(), d_positive_N * scale)
    dscale = None
    if needs[2]:
        dscale = dot_N.sum() + (d_positive_N * cosine_N).sum()
    return loss_N, positive_N - rows.max, dx_ND, dy_MD, dscale


def sigmoid(
    problem: Problem,
    upstream_N: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    *,
    scaled: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Row sums of the sigmoid loss, and the gradients of sum(upstream * rows): 3 products.

    The gradient of an entry depends on that entry alone, so one pass gives everything. dX, dY,
    dscale and doffset are in the accumulator's dtype; `upstream_N` None means ones. `scaled` says
    whether it is that of a backward, with a loss scale on it, and not weights of the loss.
    """
    need_x, need_y, need_scale, need_offset = needs
    tiles, x_ND, y_MD = problem.tiles, problem.x_ND, problem.y_MD
    scale = problem.scale_PP[0, 0]
    x_op_ND = tiles.operand(x_ND)
    products = _Products(problem, x_op_ND, need_x, need_y)
    cosine_N = tiles.row_dot(x_ND, problem.positives())
    weight_N = torch.ones_like(cosine_N) if upstream_N is None else upstream_N

    positive_N = cosine_N * scale
    if problem.offset_PP is not None:
        positive_N = positive_N + problem.offset_PP[0, 0]
    loss_N = softplus(-positive_N)
    sums = []
    for part in problem.columns.parts(y_MD, problem.columns.collect(y_MD)):
        y_op_PD = tiles.operand(part.features)
        products.begin(part, y_op_PD)
        for chunk in visit(problem, part, x_op_ND, y_op_PD):
            G_CQ = products.room(chunk) if any(needs) else None
            (seen,) = chunk.visits
            row_C, *found = tiles.sigmoid(seen.tile, weight_N[chunk.rows], G_CQ)
            loss_N[chunk.rows] += row_C
            sums.append(found)
            if G_CQ is not None:
                products.add(G_CQ, chunk)
        products.end(part, exchange_dtype(y_MD.dtype, scaled=scaled))

    d_positive_N = -torch.sigmoid(-positive_N) * weight_N
    dx_ND, dy_MD = add_positives(problem, *products.totals(), d_positive_N * scale)
    dscale = doffset = None
    if need_scale:
        dscale = torch.stack([s for s, _ in sums]).sum() + (d_positive_N * cosine_N).sum()
    if need_offset:
        doffset = torch.stack([o for _, o in sums]).sum() + d_positive_N.sum()
    return loss_N, dx_ND, dy_MD, dscale, doffset


def add_positives(
    problem: Problem,
    dx_ND: Tensor | None,
    dy_MD: Tensor | None,
    coefficient_N: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Add coefficient_i times its partner to each row and its positive; cast, if to `dtypes`."""
    tiles = problem.tiles
    x_dtype, y_dtype = dtypes or (tiles.dtype, tiles.dtype)
    if dx_ND is not None:
        out_ND = finished_room(dx_ND, x_dtype)
        tiles.finish(dx_ND, [(coefficient_N, problem.positives())], out_ND)
        dx_ND = out_ND
    if dy_MD is not None:
        dy_MD = _add_to_positives(problem, dy_MD, coefficient_N, y_dtype)
    return dx_ND, dy_MD


def _add_to_positives(
    problem: Problem, dy_MD: Tensor, coefficient_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add coefficient_i * x_i to row i's positive, and cast."""
    x_ND, with_gradient = problem.x_ND, problem.columns_with_gradient
    if problem.positive_index is not None:
        # no gradient where none is wanted, even for a positive
        coefficient_N = coefficient_N * (problem.positive_index < with_gradient)
        add_rows_(dy_MD, problem.positive_index, coefficient_N[:, None] * x_ND.to(dy_MD.dtype))
        return dy_MD.to(dtype)
    # nor here: the row's own column may be one of those
    last = min(len(x_ND), with_gradient)
    out_MD = finished_room(dy_MD, dtype)
    if out_MD is not dy_MD:
        out_MD[last:] = dy_MD[last:]
    problem.tiles.finish(dy_MD[:last], [(coefficient_N[:last], x_ND[:last])], out_MD[:last])
    return out_MD


def add_rows_(total_MD: Tensor, index_N: Tensor, rows_ND: Tensor) -> Tensor:
    """total[index[i]] += rows[i] in place, in a fixed order even where indices repeat."""
    if total_MD.device.type == "cuda":
        # sorts; index_add would use atomics
        return total_MD.index_put_((index_N,), rows_ND, accumulate=True)
    return total_MD.index_add_(0, index_N, rows_ND)


class _Products:
    """The products with G: dX over all parts, and dY of each part, which goes to its owner.

    On a triangle G of a strip serves both sides, and dX is all there is; on a strip of a
    symmetric S the mirror image of G is visited elsewhere, so no gradient is sent.
    """

    def __init__(self, problem: Problem, x_op_ND: Tensor, need_x: bool, need_y: bool) -> None:
        self.problem, self.need_y = problem, need_y and not problem.is_symmetric
        self._x_op_ND, tiles = x_op_ND, problem.tiles
        self._x_grad_ND = None
        if problem.is_triangle or not problem.is_symmetric:
            self._x_grad_ND = tiles.gradient_operand(x_op_ND)
        self.dx_ND = x_op_ND.new_zeros(x_op_ND.shape, dtype=tiles.dtype) if need_x else None
        self._first = not problem.is_symmetric

    def begin(self, part: Part, y_op_PD: Tensor) -> None:
        """The products to come are with this part, whose features enter S as `y_op_PD`."""
        tiles = self.problem.tiles
        same = y_op_PD is self._x_op_ND and self._x_grad_ND is not None
        y_grad_PD = self._x_grad_ND if same else tiles.gradient_operand(y_op_PD)
        assert y_grad_PD is not None
        self._y_grad_PD = y_grad_PD
        self._with_gradient = min(self.problem.columns_with_gradient, len(y_grad_PD))
        self._dy_PD = self.dx_ND if self.problem.is_triangle else None
        if self.need_y:
            self._dy_PD = y_grad_PD.new_zeros(y_grad_PD.shape, dtype=tiles.dtype)

    def room(self, chunk: Chunk) -> Tensor:
        """G of a chunk."""
        height = chunk.rows.stop - chunk.rows.start
        return self.problem.tiles.gradient_buffer(height, self._y_grad_PD[chunk.first :])

    def add(self, G_CQ: Tensor, chunk: Chunk) -> None:
        """Add the products with a chunk's G."""
        rows, first = chunk.rows, chunk.first
        if self.dx_ND is not None and chunk.visits:
            if self._first:
                product(G_CQ, self._y_grad_PD[first:], out=self.dx_ND[rows])
            else:
                add_product(self.dx_ND[rows], G_CQ, self._y_grad_PD[first:])
        self._add_to_columns(G_CQ, chunk)

    def add_with_dots(self, G_CQ: Tensor, chunk: Chunk) -> list[Tensor]:
        """The same, and of each visit the sum of G * cos, which is that of x_i * (G Y)_i."""
        rows, dots = chunk.rows, []
        y_grad_QD, tiles = self._y_grad_PD[chunk.first :], self.problem.tiles
        width = y_grad_QD.shape[1]
        for index, seen in enumerate(chunk.visits):
            first = self._first and index == 0
            if self.dx_ND is not None and first:
                dx_CD = self.dx_ND[rows]
            else:
                dx_CD = G_CQ.new_empty((len(G_CQ), width), dtype=tiles.dtype)
            product(G_CQ[:, seen.in_G], y_grad_QD[seen.in_G], out=dx_CD)
            dots.append(tiles.row_dot(self.problem.x_ND[rows], dx_CD).sum() / seen.tile.scale)
            if self.dx_ND is not None and not first:
                self.dx_ND[rows] += dx_CD
        self._add_to_columns(G_CQ, chunk)
        return dots

    def _add_to_columns(self, G_CQ: Tensor, chunk: Chunk) -> None:
        rows, first, right, stop = chunk.rows, chunk.first, chunk.right, self._with_gradient
        if self._dy_PD is not None and right < stop:
            assert self._x_grad_ND is not None
            G_QC = G_CQ[:, right - first : stop - first].T
            add_product(self._dy_PD[right:stop], G_QC, self._x_grad_ND[rows])

    def end(self, part: Part, dtype: torch.dtype) -> None:
        """Give the part's gradient to its owner, in `dtype` if it travels."""
        self._first = False
        if self.need_y:
            assert self._dy_PD is not None
            self.problem.columns.give(part, self._dy_PD, dtype)

    def totals(self) -> tuple[Tensor | None, Tensor | None]:
        """dX, and dY of own columns."""
        return self.dx_ND, self.problem.columns.own_gradient() if self.need_y else None
