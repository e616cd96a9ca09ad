"""The `cpp` implementation of the tiles: torch's products, then one sweep over each in cache.

A tile is worked on in blocks of columns that fit the second-level cache: a product, and at once
its whole epilogue from `csrc/`. G is formed in place of its cosines.

Shape suffixes: C rows of a tile, S its columns, B those of a block, D feature width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip import native
from fastclip.ops.chunks import chunks
from fastclip.ops.gemm import product
from fastclip.ops.tiles.base import LogSumExps, SoftmaxStats, Tile
from fastclip.ops.tiles.torch import TorchTiles

# a mebibyte for each thread
BLOCK_ENTRIES = 1 << 18
# with fewer columns the products would run at a worse rate
LEAST_COLUMNS = 256


class Biases(NamedTuple):
    """A tile's biases, and the sums of their gradients, which the library adds to."""

    row_C: Tensor
    column_S: Tensor
    row_sum_C: Tensor
    column_sum_S: Tensor

    @classmethod
    def of(cls, tile: Tile, exponentials: bool = False) -> "Biases | None":
        """Those of a tile, 0 where one side has none; their exponentials where E is kept."""
        if tile.row_bias_C is None and tile.column_bias_S is None:
            return None
        row_C, column_S = (
            side.new_zeros(len(side), dtype=torch.float32) if bias is None else bias
            for side, bias in ((tile.x_CD, tile.row_bias_C), (tile.y_SD, tile.column_bias_S))
        )
        if exponentials:
            row_C, column_S = row_C.exp(), column_S.exp()
        return cls(row_C, column_S, torch.zeros_like(row_C), torch.zeros_like(column_S))

    def part(self, block: slice) -> Any:
        """Those of some columns, as the library takes them."""
        column_S, column_sum_S = self.column_S[block], self.column_sum_S[block]
        lines = self.row_C, column_S, self.row_sum_C, column_sum_S
        return native.library().Biases(*(line.data_ptr() for line in lines))


class CppTiles(TorchTiles):
    """Tiles on the CPU, S and G in float32.

    Features of 16 bits are widened, which is exact; bf16 are not where the library multiplies them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        assert self.dtype == torch.float32
        self._native = native.library()
        self._begun: tuple[Tensor, list[tuple[Any, Tensor, slice]]] | None = None

    def operand(self, features: Tensor) -> Tensor:
        if features.dtype == torch.bfloat16 and native.has_bf16_product():
            return features if features.stride(1) == 1 else features.contiguous()
        return super().operand(features)

    def gradient_buffer(self, rows: int, operand_SD: Tensor) -> Tensor:
        return self._buffer("G", rows, len(operand_SD), operand_SD.new_empty(0, dtype=self.dtype))

    def statistics(self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None) -> None:
        biases = Biases.of(tile)
        for block, part in _blocks(tile):
            S_CB = self._buffer("S", len(part.x_CD), len(part.y_SD), part.x_CD)
            of_columns = (
                None if columns is None else SoftmaxStats(*(line[block] for line in columns))
            )
            self._native.statistics(
                _cosines(part, S_CB),
                *_pair(rows),
                *_pair(of_columns),
                torch.get_num_threads(),
                None if biases is None else biases.part(block),
            )

    def gradient(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        out_CS: Tensor,
        scalars: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = LogSumExps(*(line.contiguous() for line in rows))
        if columns is not None:
            columns = LogSumExps(*(line.contiguous() for line in columns))
        sums = torch.zeros(2 if scalars else 0, dtype=torch.float64)
        biases = Biases.of(tile)
        for block, part in _blocks(tile):
            of_columns = None if columns is None else LogSumExps(*(line[block] for line in columns))
            self._native.gradient(
                _cosines(part, out_CS[:, block]),
                *_pair(rows),
                *_pair(of_columns),
                sums.data_ptr() if scalars else 0,
                torch.get_num_threads(),
                None if biases is None else biases.part(block),
            )
        if biases is not None:
            self.bias_sums = biases.row_sum_C, biases.column_sum_S
        return self._scalars(sums)

    def exponentials(
        self,
        tile: Tile,
        anchor: Tensor,
        row_sum_C: Tensor,
        column_sum_S: Tensor | None,
        out_CS: Tensor,
    ) -> None:
        biases = Biases.of(tile, exponentials=True)
        for block, part in _blocks(tile):
            of_columns = 0 if column_sum_S is None else column_sum_S[block].data_ptr()
            self._native.exponentials(
                _cosines(part, out_CS[:, block]),
                anchor.data_ptr(),
                row_sum_C.data_ptr(),
                of_columns,
                torch.get_num_threads(),
                None if biases is None else biases.part(block),
            )

    def weigh(
        self,
        E_CS: Tensor,
        scale: Tensor,
        u_C: Tensor,
        v_S: Tensor | None,
        out_CS: Tensor,
        total: bool,
    ) -> Tensor:
        return self._weigh(E_CS, scale, u_C, v_S, out_CS, None)

    def weigh_biased(
        self, E_CS: Tensor, tile: Tile, u_C: Tensor, v_S: Tensor | None, out_CS: Tensor
    ) -> None:
        biases = Biases.of(tile, exponentials=True)
        assert biases is not None
        self._weigh(E_CS, tile.scale, u_C, v_S, out_CS, biases.part(slice(None)))
        self.bias_sums = biases.row_sum_C, biases.column_sum_S

    def _weigh(
        self,
        E_CS: Tensor,
        scale: Tensor,
        u_C: Tensor,
        v_S: Tensor | None,
        out_CS: Tensor,
        biases: Any,
    ) -> Tensor:
        scale = scale.float()
        found = self._native.weigh(
            *E_CS.shape,
            E_CS.data_ptr(),
            E_CS.stride(0),
            scale.data_ptr(),
            u_C.data_ptr(),
            0 if v_S is None else v_S.data_ptr(),
            out_CS.data_ptr(),
            out_CS.stride(0),
            torch.get_num_threads(),
            biases,
        )
        return scale.new_tensor(found)

    def begin_rows(self, tile: Tile) -> tuple[SoftmaxStats, Tensor]:
        E_CS = self.gradient_buffer(len(tile.x_CD), tile.y_SD)
        rows = SoftmaxStats.empty(len(E_CS), E_CS, self.dtype)
        dot_C = torch.zeros_like(rows.sum)
        blocks = []
        for block, part in _blocks(tile):
            max_C = torch.empty_like(dot_C)
            matrix = _cosines(part, E_CS[:, block])
            self._native.begin_rows(
                matrix, max_C.data_ptr(), *_pair(rows), dot_C.data_ptr(), torch.get_num_threads()
            )
            blocks.append((matrix, max_C, block))
        self._begun = rows.max, blocks
        return rows, dot_C

    def end_rows(self, factor_C: Tensor, out_CS: Tensor) -> None:
        assert self._begun is not None
        row_max_C, blocks = self._begun
        factor_C = factor_C.contiguous()
        for matrix, max_C, block in blocks:
            # in place: `out_CS` is the buffer that took E
            self._native.end_rows(
                matrix,
                *(line.data_ptr() for line in (max_C, row_max_C, factor_C, out_CS[:, block])),
                out_CS.stride(0),
                torch.get_num_threads(),
            )

    def sigmoid(
        self, tile: Tile, weight_C: Tensor, out_CS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_C = weight_C.contiguous()
        row_C = torch.zeros_like(weight_C)
        sums = torch.zeros(0 if out_CS is None else 2, dtype=torch.float64)
        for block, part in _blocks(tile):
            if out_CS is None:
                S_CB = self._buffer("S", len(part.x_CD), len(part.y_SD), part.x_CD)
            else:
                S_CB = out_CS[:, block]
            self._native.sigmoid(
                _cosines(part, S_CB),
                weight_C.data_ptr(),
                row_C.data_ptr(),
                0 if out_CS is None else sums.data_ptr(),
                torch.get_num_threads(),
                tile.positive_ids,
            )
        return row_C, *self._scalars(sums)

    def _scalars(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        narrow = sums.to(self.dtype)
        return (narrow[0], narrow[1]) if len(narrow) else (narrow, narrow)


def _blocks(tile: Tile) -> Iterator[tuple[slice, Tile]]:
    """The tile in blocks of columns, in order."""
    entries = BLOCK_ENTRIES * torch.get_num_threads()
    count = max(entries // len(tile.x_CD), LEAST_COLUMNS)
    column_id = tile.column_id_S
    offset = None if tile.offset is None else tile.offset.float()
    for start, stop in chunks(0, len(tile.y_SD), count):
        yield (
            slice(start, stop),
            tile._replace(
                y_SD=tile.y_SD[start:stop],
                scale=tile.scale.float(),
                offset=offset,
                diagonal=None if tile.diagonal is None else tile.diagonal - start,
                column_id_S=None if column_id is None else column_id[start:stop],
            ),
        )


def _cosines(tile: Tile, out_CB: Tensor) -> Any:
    """The product into `out_CB`, and what the library has to know about it."""
    product(tile.x_CD, tile.y_SD.T, out=out_CB)
    return native.library().Tile(*tile.described(out_CB))


def _pair(lines: SoftmaxStats | LogSumExps | None) -> tuple[int, int]:
    return (0, 0) if lines is None else (lines[0].data_ptr(), lines[1].data_ptr())
