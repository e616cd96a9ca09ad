"""The `torch` implementation of the tiles: any device torch runs on.

Shape suffixes: C rows of a tile, S its columns, D feature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype, as_operand, product
from fastclip.ops.numerics import finite, softplus
from fastclip.ops.tiles.base import LogSumExps, SoftmaxStats, Tile


class TorchTiles:
    """The `torch` implementation: any device torch runs on, every reduction in a fixed order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = accumulator_dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self._pool: dict[str, Tensor] = {}
        self.bias_sums: tuple[Tensor | None, Tensor | None] = (None, None)

    def operand(self, features: Tensor) -> Tensor:
        return as_operand(features)

    def gradient_operand(self, operand: Tensor) -> Tensor:
        return operand

    def gradient_buffer(self, rows: int, operand_SD: Tensor) -> Tensor:
        return self._buffer("G", rows, operand_SD.shape[0], operand_SD)

    def statistics(self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None) -> None:
        S_CS = self._logits(tile)
        biases = tile.column_bias_S, tile.row_bias_C
        for dim, running, bias in ((1, rows, biases[0]), (0, columns, biases[1])):
            if running is None:
                continue
            biased_CS = S_CS
            if bias is not None:
                biased_CS = torch.add(S_CS, bias.unsqueeze(1 - dim), out=self._like("biased", S_CS))
            maximum = biased_CS.amax(dim=dim)
            exp_CS = self._exp(biased_CS, finite(maximum).unsqueeze(dim))
            if tile.offset is not None:
                maximum += tile.offset
            running.merge_(maximum, exp_CS.sum(dim=dim))

    def gradient(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        out_CS: Tensor,
        scalars: bool,
    ) -> tuple[Tensor, Tensor]:
        S_CS = self._logits(tile)
        G_CS = out_CS if out_CS.dtype == self.dtype else self._like("g", S_CS)
        anchor_C, anchor_S = (
            None if lines is None else _without(finite(lines.lse), tile.offset)
            for lines in (rows, columns)
        )
        assert anchor_C is not None
        torch.sub(S_CS, anchor_C[:, None], out=G_CS)
        by_row = by_column = None
        if tile.column_bias_S is not None:
            G_CS.add_(tile.column_bias_S)
        G_CS.exp_().mul_((rows.upstream * tile.scale)[:, None])
        if tile.column_bias_S is not None:
            by_column = G_CS.sum(dim=0).div_(tile.scale)
        if columns is not None:
            assert anchor_S is not None
            # S stays, dscale needs it
            exp_CS = torch.sub(S_CS, anchor_S, out=self._like("exp", S_CS))
            if tile.row_bias_C is not None:
                exp_CS.add_(tile.row_bias_C[:, None])
            exp_CS.exp_()
            if tile.row_bias_C is not None:
                by_row = torch.mv(exp_CS, columns.upstream)
            G_CS.addcmul_(exp_CS, columns.upstream * tile.scale)
        self.bias_sums = by_row, by_column
        return self._sums(tile, S_CS, G_CS, out_CS, scalars)

    def exponentials(
        self,
        tile: Tile,
        anchor: Tensor,
        row_sum_C: Tensor,
        column_sum_S: Tensor | None,
        out_CS: Tensor,
    ) -> None:
        product(tile.x_CD, tile.y_SD.T, out=out_CS).mul_(tile.scale)
        out_CS.sub_(_without(anchor, tile.offset)).exp_()
        self._leave_out(out_CS, tile, 0.0)
        row_sum_C += _weighted_sum(out_CS, tile.column_bias_S, 1)
        if column_sum_S is not None:
            column_sum_S += _weighted_sum(out_CS, tile.row_bias_C, 0)

    def weigh(
        self,
        E_CS: Tensor,
        scale: Tensor,
        u_C: Tensor,
        v_S: Tensor | None,
        out_CS: Tensor,
        total: bool,
    ) -> Tensor:
        u_C = (u_C * scale)[:, None]
        if v_S is None:
            torch.mul(E_CS, u_C, out=out_CS)
        else:
            torch.add(u_C, v_S * scale, out=out_CS).mul_(E_CS)
        return out_CS.sum(dim=1).sum() / scale if total else scale.new_zeros(())

    def weigh_biased(
        self, E_CS: Tensor, tile: Tile, u_C: Tensor, v_S: Tensor | None, out_CS: Tensor
    ) -> None:
        by_row = by_column = None
        # E with its bias first: by itself neither need be in range times the other's factor
        if tile.column_bias_S is None:
            torch.mul(E_CS, u_C[:, None], out=out_CS)
        else:
            torch.mul(E_CS, tile.column_bias_S.exp(), out=out_CS).mul_(u_C[:, None])
            by_column = out_CS.sum(dim=0)
        if v_S is not None:
            term_CS = self._like("exp", E_CS)
            if tile.row_bias_C is None:
                torch.mul(E_CS, v_S, out=term_CS)
            else:
                torch.mul(E_CS, tile.row_bias_C.exp()[:, None], out=term_CS).mul_(v_S)
                by_row = term_CS.sum(dim=1)
            out_CS.add_(term_CS)
        out_CS.mul_(tile.scale)
        self.bias_sums = by_row, by_column

    def begin_rows(self, tile: Tile) -> tuple[SoftmaxStats, Tensor]:
        S_CS = self._logits(tile)
        maximum_C = S_CS.amax(dim=1)
        exp_CS = self._exp(S_CS, finite(maximum_C)[:, None])
        # -inf would make 0 * -inf
        self._leave_out(S_CS, tile, 0.0)
        dot_C = S_CS.mul_(exp_CS).sum(dim=1).div_(tile.scale)
        return SoftmaxStats(maximum_C, exp_CS.sum(dim=1)), dot_C

    def end_rows(self, factor_C: Tensor, out_CS: Tensor) -> None:
        exp_CS = self._like("exp", out_CS)
        if out_CS.dtype == exp_CS.dtype:
            torch.mul(exp_CS, factor_C[:, None], out=out_CS)
        else:
            out_CS.copy_(exp_CS.mul_(factor_C[:, None]))

    def sigmoid(
        self, tile: Tile, weight_C: Tensor, out_CS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        S_CS = self._logits(tile)
        z_CS = self._like("exp", S_CS)
        if tile.offset is None:
            z_CS.copy_(S_CS)
        else:
            torch.add(S_CS, tile.offset, out=z_CS)
        sign_CS = None
        if tile.positive_ids and tile.row_id_C is not None and tile.column_id_S is not None:
            same_CS = tile.row_id_C[:, None] == tile.column_id_S
            sign_CS = torch.where(same_CS, -1.0, 1.0)
            z_CS.mul_(sign_CS)
            self._leave_out(z_CS, tile, -torch.inf)
        if out_CS is None:
            row_C = softplus(z_CS, out=z_CS).sum(dim=1)
            none = row_C.new_empty(0)
            return row_C, none, none
        room_CS = out_CS if out_CS.dtype == self.dtype else self._like("g", S_CS)
        row_C = softplus(z_CS, out=room_CS).sum(dim=1)
        G_CS = torch.sigmoid(z_CS, out=z_CS).mul_((weight_C * tile.scale)[:, None])
        if sign_CS is not None:
            G_CS.mul_(sign_CS)
        sums = self._sums(tile, S_CS, G_CS, out_CS, True)
        return row_C, *sums

    def finish(
        self, total_CD: Tensor, terms: Sequence[tuple[Tensor, Tensor]], out_CD: Tensor
    ) -> None:
        for coefficient_C, partner_CD in terms:
            total_CD.addcmul_(coefficient_C[:, None], partner_CD.to(total_CD.dtype))
        if out_CD.data_ptr() != total_CD.data_ptr():
            out_CD.copy_(total_CD)

    def row_dot(self, a_CD: Tensor, b_CD: Tensor) -> Tensor:
        dots: Tensor = torch.linalg.vecdot(a_CD.to(self.dtype), b_CD.to(self.dtype))
        return dots

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A contiguous (rows, columns) view of a buffer that only grows."""
        flat = self._pool.get(name)
        if flat is None or flat.numel() < rows * columns:
            dtype = like.dtype if name == "G" else self.dtype
            flat = self._pool[name] = like.new_empty(rows * columns, dtype=dtype)
        return flat[: rows * columns].view(rows, columns)

    def _like(self, name: str, matrix: Tensor) -> Tensor:
        return self._buffer(name, matrix.shape[0], matrix.shape[1], matrix)

    def _logits(self, tile: Tile) -> Tensor:
        """scale * cos, entries that are left out at -inf."""
        x_CD, y_SD = tile.x_CD, tile.y_SD
        S_CS = self._buffer("S", x_CD.shape[0], y_SD.shape[0], x_CD)
        product(x_CD, y_SD.T, out=S_CS).mul_(tile.scale)
        self._leave_out(S_CS, tile, -torch.inf)
        return S_CS

    def _leave_out(self, S_CS: Tensor, tile: Tile, value: float) -> None:
        if tile.crosses_diagonal and tile.diagonal is not None:
            S_CS.diagonal(offset=tile.diagonal).fill_(value)
        if tile.positive_ids:
            return
        if tile.row_id_C is not None and tile.column_id_S is not None:
            S_CS.masked_fill_(tile.row_id_C[:, None] == tile.column_id_S[None, :], value)

    def _exp(self, S_CS: Tensor, anchor: Tensor) -> Tensor:
        exp_CS = self._like("exp", S_CS)
        return torch.sub(S_CS, anchor, out=exp_CS).exp_()

    def _sums(
        self, tile: Tile, S_CS: Tensor, G_CS: Tensor, out_CS: Tensor, scalars: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums of G * cos and G, where `G_CS` holds G times the scale; `S_CS` is overwritten."""
        if G_CS is not out_CS:
            out_CS.copy_(G_CS)
        if not scalars:
            none = S_CS.new_empty(0)
            return none, none
        scale = tile.scale
        total = G_CS.sum(dim=1).sum() / scale if tile.offset is not None else scale.new_zeros(())
        self._leave_out(S_CS, tile, 0.0)
        return S_CS.mul_(G_CS).sum(dim=1).sum() / scale / scale, total


def _weighted_sum(E_CS: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """Sums over rows (0) or columns (1), whose exponentials have a bias each."""
    if bias is None:
        return E_CS.sum(dim=dim)
    return torch.mv(E_CS if dim else E_CS.T, bias.exp())


def _without(line: Tensor, offset: Tensor | None) -> Tensor:
    return line if offset is None else line - offset
