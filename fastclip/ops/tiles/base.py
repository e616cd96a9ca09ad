"""Tiles of the similarity matrix: what an implementation of the operators has to provide.

The operators visit S in tiles of C rows by S columns and need of each tile:

    statistics   rows' and columns' (max, sum of exponentials), merged into running ones
    gradient     G, the gradient of the tile's products, from given log-sum-exps
    begin_rows,
    end_rows     both at once where a tile holds its rows whole (one product instead of two)
    sigmoid      softplus row sums and G of the sigmoid loss
    exponentials,
    weigh        sums and exponentials about a given anchor, and G from these: where they are kept
    statistics_and_exponentials,
    gradient_of_exponentials
                 the same where the device decides for each of its tiles which of them serve
    products_CS  of a tile: where products are kept, and not exponentials
and of a gradient

    finish       its terms of positives, added, and the cast to the features' dtype

The order of the visits (`schedule.py`), the loops (`passes.py`) and the products with G
(`gemm.py`) are common to all implementations. `TorchTiles` (`torch.py`) runs everywhere.

A logit is S = scale * cos + offset. The offset is never added to a tile: it goes into the
anchors, so that sums of G * cos need no subtraction.

Shape suffixes: C rows of a tile, S its columns, D feature width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastclip.ops.numerics import finite, largest_logit


class Tile(NamedTuple):
    """One tile: operands, the domain pair's scale and offset, and which entries are left out.

    The entry (c, c + diagonal) is no negative, nor are entries whose row and column ids agree. With
    `positive_ids`, which the sigmoid loss alone has, those that agree are positives. A column bias
    is added in the rows' softmaxes, a row bias in the columns'; `BiasingTiles` alone know these.
    bias_spread: how far the finite ones of the whole call reach down from 0.
    products_CS: room of an implementation that keeps products: `statistics` leaves x @ y.T there,
    in the accumulator's dtype, and `gradient` takes it from there and leaves it as it is.
    """

    x_CD: Tensor
    y_SD: Tensor
    scale: Tensor
    offset: Tensor | None
    diagonal: int | None
    row_id_C: Tensor | None = None
    column_id_S: Tensor | None = None
    positive_ids: bool = False
    products_CS: Tensor | None = None
    row_bias_C: Tensor | None = None
    column_bias_S: Tensor | None = None
    bias_spread: Tensor | None = None

    @property
    def crosses_diagonal(self) -> bool:
        """Whether any entry lies on the diagonal that is left out."""
        if self.diagonal is None:
            return False
        return -self.x_CD.shape[0] < self.diagonal < self.y_SD.shape[0]

    def described(self, cosines_CS: Tensor) -> tuple[Any, ...]:
        """What the native library's tiles are made of, where the cosines are in memory."""
        ids: tuple[int, int, int] = 0, 0, 0
        if self.row_id_C is not None and self.column_id_S is not None:
            row_id, column_id = self.row_id_C, self.column_id_S
            ids = row_id.data_ptr(), column_id.data_ptr(), row_id.itemsize
        return (
            cosines_CS.data_ptr(),
            *cosines_CS.shape,
            cosines_CS.stride(0),
            self.scale.data_ptr(),
            0 if self.offset is None else self.offset.data_ptr(),
            self.diagonal if self.crosses_diagonal else None,
            *ids,
        )


class LogSumExps(NamedTuple):
    """Log-sum-exps of rows (or columns) of S, and their upstream gradients."""

    lse: Tensor
    upstream: Tensor

    def part(self, which: slice) -> "LogSumExps":
        """Some of the rows, as views."""
        return LogSumExps(self.lse[which], self.upstream[which])


class SoftmaxStats(NamedTuple):
    """Of rows (or columns) of S, over the tiles visited: maximum, sum of exp(S - maximum)."""

    max: Tensor
    sum: Tensor

    @staticmethod
    def empty(rows: int, like: Tensor, dtype: torch.dtype) -> "SoftmaxStats":
        """Over no tiles yet."""
        return SoftmaxStats(
            like.new_full((rows,), -torch.inf, dtype=dtype), like.new_zeros(rows, dtype=dtype)
        )

    def part(self, which: slice) -> "SoftmaxStats":
        """Some of the rows, as views."""
        return SoftmaxStats(self.max[which], self.sum[which])

    def merge_(self, maximum: Tensor, total: Tensor) -> None:
        """Add a tile's, in place."""
        merged = torch.maximum(self.max, maximum)
        anchor = finite(merged)
        self.sum.mul_(torch.exp(self.max - anchor)).add_(total * torch.exp(maximum - anchor))
        self.max.copy_(merged)

    def lse(self) -> Tensor:
        """The log-sum-exps; -inf for rows without negatives.

        NaN once a maximum is beyond `largest_logit`: floats there are 2 apart, so that exp(S - lse)
        has no correct digit.
        """
        anchor = finite(self.max)
        dtype = anchor.dtype
        # overflows from there on, and 0 * inf is NaN
        beyond = anchor * (torch.finfo(dtype).max / largest_logit(dtype))
        return torch.log(self.sum).add_(anchor).add_(beyond, alpha=0)


class Tiles(Protocol):
    """An implementation; one instance serves one call of an operator and owns its buffers."""

    dtype: torch.dtype
    """The accumulator's dtype: of sums, log-sum-exps and unfinished gradients."""
    itemsize: int
    """Bytes of an entry of S or G that is held in memory."""

    def operand(self, features: Tensor) -> Tensor:
        """Features as they enter S."""

    def gradient_operand(self, operand: Tensor) -> Tensor:
        """An operand of S as it enters products with G."""

    def gradient_buffer(self, rows: int, operand_SD: Tensor) -> Tensor:
        """Room for G, rows x S, in the dtype of `operand_SD`; valid until the next call."""

    def statistics(self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None) -> None:
        """Merge the tile's statistics into the running ones."""

    def gradient(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        out_CS: Tensor,
        scalars: bool,
    ) -> tuple[Tensor, Tensor]:
        """G times the scale into `out_CS`; the sums of G * cos and of G if `scalars`."""

    def begin_rows(self, tile: Tile) -> tuple[SoftmaxStats, Tensor]:
        """Statistics of whole rows, without offset; each row's sum of exp(S - max) * cos, (C,)."""

    def end_rows(self, factor_C: Tensor, out_CS: Tensor) -> None:
        """factor * exp(S - max) of the tile that began last, into `out_CS`."""

    def sigmoid(
        self, tile: Tile, weight_C: Tensor, out_CS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row sums of softplus(S); where `out_CS` is given G times the scale goes there.

        G = weight * sigmoid(S); the other two results are its sums with cos and alone. A positive
        has -S in place of S, and -G in place of G.
        """

    def finish(
        self, total_CD: Tensor, terms: Sequence[tuple[Tensor, Tensor]], out_CD: Tensor
    ) -> None:
        """out = total + sum of coefficient_C * partner_CD, cast once.

        `total_CD` may be overwritten; `out_CD` may be `total_CD`.
        """

    def row_dot(self, a_CD: Tensor, b_CD: Tensor) -> Tensor:
        """Row-wise products in the accumulator's dtype, (C,)."""


class KeepingTiles(Tiles, Protocol):
    """An implementation that can keep exponentials for the backward."""

    def exponentials(
        self,
        tile: Tile,
        anchor: Tensor,
        row_sum_C: Tensor,
        column_sum_S: Tensor | None,
        out_CS: Tensor,
    ) -> None:
        """E = exp(S - anchor) into `out_CS`, 0 where left out; its sums added to those given."""

    def weigh(
        self,
        E_CS: Tensor,
        scale: Tensor,
        u_C: Tensor,
        v_S: Tensor | None,
        out_CS: Tensor,
        total: bool,
    ) -> Tensor:
        """G times the scale, scale * E * (u + v), into `out_CS`; the sum of G if `total`."""

    def weigh_biased(
        self, E_CS: Tensor, tile: Tile, u_C: Tensor, v_S: Tensor | None, out_CS: Tensor
    ) -> None:
        """`weigh`: scale * E * (u exp(column bias) + v exp(row bias)) into `out_CS`.

        E is that of `exponentials`, whose sums alone are weighed by biases; they are at most 0.
        """


class BiasingTiles(Tiles, Protocol):
    """An implementation whose tiles can have biases."""

    bias_sums: tuple[Tensor | None, Tensor | None]
    """Of the last tile whose gradient was formed: by row bias, (C,), and by column bias, (S,)."""


class FlaggingTiles(Tiles, Protocol):
    """An implementation that can keep exponentials, and finds on the device which of them serve."""

    def statistics_and_exponentials(
        self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None, out_CS: Tensor
    ) -> None:
        """`statistics`, and E about an anchor of the tile's own into `out_CS`, 0 where left out.

        What lies beyond the last row and column may be overwritten.
        """

    def gradient_of_exponentials(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        E_CS: Tensor,
        out_CS: Tensor,
        total: bool,
    ) -> Tensor:
        """G times the scale into `out_CS`, S formed again where E does not serve.

        Returns the sum of G if `total`.
        """


def finished(
    tiles: Tiles, total: Tensor, terms: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    """`Tiles.finish`, in place where nothing is to be cast."""
    out = finished_room(total, dtype)
    tiles.finish(total, terms, out)
    return out


def finished_room(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Where `Tiles.finish` casts a total to: itself where nothing is to be cast."""
    return total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)
