"""The `triton` implementation of the tiles: kernels in `kernels/`, products with G by cuBLAS."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import fastclip.kernels.finish as finishing
import fastclip.kernels.flagged as flagged
import fastclip.kernels.flags as flagging
import fastclip.kernels.lean as lean
import fastclip.kernels.merge as merging
import fastclip.kernels.sigmoid as sigmoid
import fastclip.kernels.similarity as similarity
import fastclip.kernels.weigh as weighing
from fastclip.kernels.launch import Tiling, tiling
from fastclip.kernels.lean import Biases, Logits
from fastclip.ops.gemm import count_product, gradient_dtype
from fastclip.ops.tiles.base import LogSumExps, SoftmaxStats, Tile


class TritonTiles:
    """Tiles of S that never leave the chip; float32, bf16 and fp16."""

    dtype = torch.float32

    def __init__(self, dtype: torch.dtype, maxima: bool = True) -> None:
        self.maxima = maxima
        """Whether running maxima are those of the logits; else they are anchors of the sums."""
        self._gradient_dtype = gradient_dtype(dtype)
        self.itemsize = self._gradient_dtype.itemsize
        self._buffer: Tensor | None = None
        self._begun: tuple[Tensor, Tensor, Tensor, Tiling] | None = None
        self.bias_sums: tuple[Tensor | None, Tensor | None] = (None, None)

    def operand(self, features: Tensor) -> Tensor:
        return features if features.stride(1) == 1 else features.contiguous()

    def gradient_operand(self, operand: Tensor) -> Tensor:
        return operand.to(self._gradient_dtype)

    def gradient_buffer(self, rows: int, operand_SD: Tensor) -> Tensor:
        return self._room(rows, operand_SD.shape[0], operand_SD.device)

    def statistics(self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None) -> None:
        self._statistics(tile, rows, columns, None)

    def statistics_and_exponentials(
        self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None, out_CS: Tensor
    ) -> None:
        self._statistics(tile, rows, columns, out_CS)

    def _statistics(
        self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None, kept_CS: Tensor | None
    ) -> None:
        self._count(tile)
        only_rows = columns is None
        logits = _logits(tile, only_rows)
        tiles = self._tiling(
            "statistics", tile, rows=only_rows, maxima=self.maxima, kept=kept_CS is not None
        )
        found = lean.statistics(logits, not only_rows, self.maxima, kept_CS, tiles)
        flags = flagging.totals(logits, found, rows, columns)
        own = self._tiling("own_statistics", tile, rows=only_rows)
        flagged.statistics(logits, found, flags, rows, columns, own)

    def gradient(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        out_CS: Tensor,
        scalars: bool,
    ) -> tuple[Tensor, Tensor]:
        self._count(tile)
        logits, of_rows = _logits(tile, columns is None), _lines(rows)
        of_columns = None if columns is None else _lines(columns)
        tiles, own = self._gradient_tilings(tile, rows=columns is None, frozen=not scalars)
        factors = flagging.factors(logits, of_rows, of_columns, tiles)
        found = dots, sums = _slots(tile, own)
        wanted = found if scalars else (dots[:0], sums[:0])
        biases = _bias_slots(logits, own)
        lean.gradient(
            logits, factors, columns is not None, out_CS, wanted, biases, own.parts, tiles
        )
        flagged.gradient(logits, factors[2], of_rows, of_columns, out_CS, found, biases, own)
        self._add_up(biases)
        dots, sums = wanted
        return dots.sum(), sums.sum()

    def gradient_of_exponentials(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        E_CS: Tensor,
        out_CS: Tensor,
        total: bool,
    ) -> Tensor:
        logits, of_rows = _logits(tile, columns is None), _lines(rows)
        of_columns = None if columns is None else _lines(columns)
        tiles, own = self._gradient_tilings(tile, rows=columns is None)
        factors = flagging.factors(logits, of_rows, of_columns, tiles)
        found = _slots(tile, own)
        wanted = found[1] if total else found[1][:0]
        biases = _bias_slots(logits, own)
        weighing.weigh(
            E_CS, factors, logits, columns is not None, out_CS, wanted, biases, own.parts, tiles
        )
        flagged.gradient(logits, factors[2], of_rows, of_columns, out_CS, found, biases, own)
        self._add_up(biases)
        return wanted.sum()

    def begin_rows(self, tile: Tile) -> tuple[SoftmaxStats, Tensor]:
        self._count(tile)
        r, s = tile.x_CD.shape[0], tile.y_SD.shape[0]
        kept = self._room(r, s, tile.x_CD.device)
        if kept.dtype != torch.float32:
            # relative to its tile's row maximum E is in (0, 1]: fp16 has three bits more than bf16
            kept = kept.view(torch.float16)
        tiles = self._tiling("own_statistics", tile, rows=True, kept=True)
        row_max, row_sum, _, _, row_dot = similarity.statistics(
            *_operands(tile), False, kept, tiles
        )
        rows = SoftmaxStats.empty(r, tile.x_CD, torch.float32)
        dot = merging.merge(row_max, row_sum, row_dot, *rows, None)
        self._begun = kept, row_max, rows.max, tiles
        return rows, dot

    def end_rows(self, factor_C: Tensor, out_CS: Tensor) -> None:
        assert self._begun is not None
        kept, part_max, row_max, tiles = self._begun
        merging.rescale(kept, out_CS, part_max, row_max, factor_C, tiles)

    def sigmoid(
        self, tile: Tile, weight_C: Tensor, out_CS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._count(tile)
        x, y, scale, ids, diagonal = _operands(tile)
        return sigmoid.sigmoid(
            x,
            y,
            scale,
            tile.offset,
            diagonal,
            ids,
            tile.positive_ids,
            weight_C.contiguous(),
            out_CS,
            self._tiling("sigmoid", tile, loss=out_CS is None),
        )

    def finish(
        self, total_CD: Tensor, terms: Sequence[tuple[Tensor, Tensor]], out_CD: Tensor
    ) -> None:
        if not terms:
            if out_CD.data_ptr() != total_CD.data_ptr():
                finishing.finish(total_CD, None, None, out_CD)
            return
        *others, last = [(c.contiguous(), self.operand(partner)) for c, partner in terms]
        for coefficient, partner in others:
            finishing.finish(total_CD, coefficient, partner, total_CD)
        finishing.finish(total_CD, *last, out_CD)

    def row_dot(self, a_CD: Tensor, b_CD: Tensor) -> Tensor:
        out = a_CD.new_empty(a_CD.shape[0], dtype=torch.float32)
        finishing.row_dot(self.operand(a_CD), self.operand(b_CD), out)
        return out

    def _add_up(self, biases: tuple[Tensor, Tensor]) -> None:
        by_row, by_column = (lines.sum(dim=0) if len(lines) else None for lines in biases)
        self.bias_sums = by_row, by_column

    def _room(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows, columns) of the buffer that first holds E and then G; it only grows."""
        height, stride = similarity.room_for(rows, columns)
        size = height * stride
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=self._gradient_dtype, device=device)
        return self._buffer[:size].view(height, stride)[:rows, :columns]

    def _gradient_tilings(
        self, tile: Tile, rows: bool, frozen: bool = False
    ) -> tuple[Tiling, Tiling]:
        """By the common anchor, and by a tile's own maxima."""
        offset = tile.offset is not None
        tiles = self._tiling("gradient", tile, rows=rows, offset=offset, frozen=frozen)
        # of the same tiles; registers hold less of each at a time
        parts = self._tiling("own_gradient", tile, rows=rows, offset=offset).parts
        return tiles, replace(tiles, parts=parts, registers=None)

    def _tiling(self, kernel: str, tile: Tile, **asked: bool) -> Tiling:
        x, y = tile.x_CD, tile.y_SD
        asked |= {"ids": tile.row_id_C is not None, "biased": tile.bias_spread is not None}
        variant = frozenset(word for word, wanted in asked.items() if wanted)
        return tiling(kernel, variant, x.dtype, x.device, x.shape[0] * y.shape[0])

    def _count(self, tile: Tile) -> None:
        count_product(tile.x_CD.shape[0], tile.x_CD.shape[1], tile.y_SD.shape[0])


def _operands(
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, int | None]:
    ids = None
    if tile.row_id_C is not None and tile.column_id_S is not None:
        ids = tile.row_id_C, tile.column_id_S
    diagonal = tile.diagonal if tile.crosses_diagonal else None
    return tile.x_CD, tile.y_SD, tile.scale, ids, diagonal


def _logits(tile: Tile, only_rows: bool) -> Logits:
    x, y, scale, ids, diagonal = _operands(tile)
    biases = None
    if tile.bias_spread is not None:
        # that of a row enters its columns' softmaxes alone
        of_rows = None if only_rows else tile.row_bias_C
        biases = Biases(of_rows, tile.column_bias_S, tile.bias_spread)
    return Logits(x, y, scale, tile.offset, ids, diagonal, biases)


def _slots(tile: Tile, own: Tiling) -> tuple[Tensor, Tensor]:
    """Room for sums of G * cos and, with an offset, of G, of all tiles' parts."""
    slots = -(-len(tile.x_CD) // own.rows) * -(-len(tile.y_SD) // own.columns) * own.parts
    sums = tile.scale.new_empty(slots if tile.offset is not None else 0)
    return tile.scale.new_empty(slots), sums


def _bias_slots(logits: Logits, own: Tiling) -> tuple[Tensor, Tensor]:
    """Room for sums of G's shares over a tile's rows and columns; empty where not wanted."""
    r, s = len(logits.x), len(logits.y)
    tiles_r, tiles_s = -(-r // own.rows), -(-s // own.columns)
    asked = logits.biased()
    by_row = logits.scale.new_empty((tiles_s * own.parts if asked["HAS_ROW_BIAS"] else 0, r))
    by_column = logits.scale.new_empty((tiles_r if asked["HAS_COLUMN_BIAS"] else 0, s))
    return by_row, by_column


def _lines(lines: LogSumExps) -> tuple[Tensor, Tensor]:
    return lines.lse.contiguous(), lines.upstream.contiguous()
