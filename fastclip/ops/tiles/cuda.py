"""The `cuda` implementation of the tiles: float32 products by cuBLAS, swept by kernels in `csrc/`.

S is a tile in memory, in float32 and never rounded; one kernel reads each entry once and forms the
statistics, or G in its place or beside it. A warp finds by itself whether the anchor that all rows
and columns share serves its own, and takes their maxima if not. What pieces of a tile say of their
lines and of scalars is merged in a fixed order. What is kept for the backward is the products. For
GPUs where Triton cannot run.

Shape suffixes: C rows of a tile, S its columns, P pieces of a line, D feature width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip import native
from fastclip.ops.gemm import gradient_dtype, product
from fastclip.ops.tiles.base import LogSumExps, SoftmaxStats, Tile

# csrc/include/fastclip/cuda_epilogues.h has the same numbers
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# rows of S and G begin aligned for cuBLAS and for loads of four entries
ALIGNED_ENTRIES = 16


class _Biases(NamedTuple):
    """A tile's biases, and room for what each piece finds of their gradients."""

    row_C: Tensor
    column_S: Tensor
    row_sum_PC: Tensor
    column_sum_PS: Tensor

    @classmethod
    def of(cls, tile: Tile, down: int = 0, across: int = 0) -> "_Biases | None":
        """Those of a tile in so many pieces, 0 where one side has none."""
        if tile.row_bias_C is None and tile.column_bias_S is None:
            return None
        rows, columns = len(tile.x_CD), len(tile.y_SD)
        row_C, column_S = (
            tile.scale.new_zeros(size) if bias is None else bias
            for size, bias in ((rows, tile.row_bias_C), (columns, tile.column_bias_S))
        )
        room = row_C.new_empty((across, rows)), row_C.new_empty((down, columns))
        return cls(row_C, column_S, *room)

    def described(self) -> Any:
        return native.library().Biases(*_addresses(self))


class CudaTiles:
    """Tiles on NVIDIA GPUs; float32, bf16 and fp16."""

    dtype = torch.float32

    def __init__(self, dtype: torch.dtype, maxima: bool = True) -> None:
        self.maxima = maxima
        """Whether running maxima are those of the logits; else they may be anchors of the sums."""
        self._gradient_dtype = gradient_dtype(dtype)
        # float32 G takes the place of S, a narrower one stands beside it
        self._in_place = dtype == torch.float32
        self.itemsize = 4 if self._in_place else 6
        self._library = native.library().cuda
        self._pool: dict[str, Tensor] = {}
        self._begun: tuple[Any, Tensor, Tensor] | None = None
        self.bias_sums: tuple[Tensor | None, Tensor | None] = (None, None)

    def operand(self, features: Tensor) -> Tensor:
        return features if features.stride(1) == 1 else features.contiguous()

    def gradient_operand(self, operand: Tensor) -> Tensor:
        return operand.to(self._gradient_dtype)

    def gradient_buffer(self, rows: int, operand_SD: Tensor) -> Tensor:
        like = operand_SD.new_empty(0, dtype=self._gradient_dtype)
        return self._room("G", rows, len(operand_SD), like)

    def statistics(self, tile: Tile, rows: SoftmaxStats, columns: SoftmaxStats | None) -> None:
        tile = _wide(tile)
        kept = tile.products_CS
        cosines = self._cosines(tile, self._products(tile) if kept is None else kept)
        down, across = cosines.pieces
        of_rows = tile.scale.new_empty((2, across, len(tile.x_CD)))
        of_columns = None
        if columns is not None:
            of_columns = tile.scale.new_empty((2, down, len(tile.y_SD)))
        columns_at = (0, 0) if of_columns is None else _addresses(of_columns)
        biases = _Biases.of(tile)
        self._queue(
            "statistics",
            tile,
            cosines,
            *_addresses(of_rows),
            *columns_at,
            self.maxima,
            None if biases is None else biases.described(),
        )
        self._merge(tile, (of_rows, rows), (of_columns, columns))

    def gradient(
        self,
        tile: Tile,
        rows: LogSumExps,
        columns: LogSumExps | None,
        out_CS: Tensor,
        scalars: bool,
    ) -> tuple[Tensor, Tensor]:
        tile = _wide(tile)
        if tile.products_CS is not None:
            cosines = self._described(tile, tile.products_CS)
        else:
            cosines = self._cosines(tile, out_CS if self._in_place else self._products(tile))
        rows = LogSumExps(*(line.contiguous() for line in rows))
        if columns is not None:
            columns = LogSumExps(*(line.contiguous() for line in columns))
        sums = self._room_for_sums(cosines, tile, scalars)
        biases = _Biases.of(tile, *cosines.pieces)
        self._queue(
            "gradient",
            tile,
            cosines,
            *_addresses(rows),
            *((0, 0) if columns is None else _addresses(columns)),
            _place(out_CS),
            sums.data_ptr() if scalars else 0,
            None if biases is None else biases.described(),
        )
        if biases is not None:
            by_row, by_column = biases.row_sum_PC, biases.column_sum_PS
            self.bias_sums = None if columns is None else by_row.sum(dim=0), by_column.sum(dim=0)
        return self._scalars(sums)

    def begin_rows(self, tile: Tile) -> tuple[SoftmaxStats, Tensor]:
        tile = _wide(tile)
        rows = len(tile.x_CD)
        E_CS = self.gradient_buffer(rows, tile.y_SD) if self._in_place else self._products(tile)
        cosines = self._cosines(tile, E_CS)
        part = tile.scale.new_empty((3, cosines.pieces[1], rows))
        self._queue("begin_rows", tile, cosines, *_addresses(part))
        found = SoftmaxStats.empty(rows, E_CS, self.dtype)
        dot_C = torch.empty_like(found.sum)
        self._merge(tile, (part, found), (None, None), dot_C)
        self._begun = cosines, part, found.max
        return found, dot_C

    def end_rows(self, factor_C: Tensor, out_CS: Tensor) -> None:
        assert self._begun is not None
        E, part, row_max_C = self._begun
        factor_C = factor_C.contiguous()
        lines = part[0].data_ptr(), row_max_C.data_ptr(), factor_C.data_ptr()
        self._queue("end_rows", factor_C, E, *lines, _place(out_CS))

    def sigmoid(
        self, tile: Tile, weight_C: Tensor, out_CS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tile = _wide(tile)
        weight_C = weight_C.contiguous()
        room_CS = out_CS if self._in_place else None
        cosines = self._cosines(tile, self._products(tile) if room_CS is None else room_CS)
        row_PC = tile.scale.new_empty((cosines.pieces[1], len(weight_C)))
        sums = self._room_for_sums(cosines, tile, out_CS is not None)
        self._queue(
            "sigmoid",
            tile,
            cosines,
            weight_C.data_ptr(),
            row_PC.data_ptr(),
            _place(out_CS),
            sums.data_ptr(),
            tile.positive_ids,
        )
        return row_PC.sum(dim=0), *self._scalars(sums)

    def finish(
        self, total_CD: Tensor, terms: Sequence[tuple[Tensor, Tensor]], out_CD: Tensor
    ) -> None:
        if not terms:
            if out_CD.data_ptr() != total_CD.data_ptr():
                out_CD.copy_(total_CD)
            return
        for index, (coefficient_C, partner_CD) in enumerate(terms):
            last = index == len(terms) - 1
            coefficient_C, partner_CD = coefficient_C.contiguous(), self.operand(partner_CD)
            self._queue(
                "finish",
                total_CD,
                *total_CD.shape,
                _place(total_CD),
                coefficient_C.data_ptr(),
                _place(partner_CD),
                _place(out_CD if last else total_CD),
            )

    def row_dot(self, a_CD: Tensor, b_CD: Tensor) -> Tensor:
        a_CD, b_CD = self.operand(a_CD), self.operand(b_CD)
        out_C = a_CD.new_empty(len(a_CD), dtype=self.dtype)
        where = _place(a_CD), _place(b_CD), out_C.data_ptr()
        self._queue("row_dot", a_CD, *a_CD.shape, *where)
        return out_C

    def _queue(self, name: str, on: Tile | Tensor, *arguments: Any) -> None:
        """Launch a kernel on the stream that torch uses on the device of `on`."""
        device = on.x_CD.device if isinstance(on, Tile) else on.device
        on_gpu = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        # CUDA launches on the current device, whatever device the memory is on
        with torch.cuda.device(device) if on_gpu else nullcontext():
            getattr(self._library, name)(*arguments, stream)

    def _merge(
        self,
        tile: Tile,
        rows: tuple[Tensor, SoftmaxStats],
        columns: tuple[Tensor | None, SoftmaxStats | None],
        dot_C: Tensor | None = None,
    ) -> None:
        """Merge (max, sum[, dot]) of the pieces' lines into the running ones, which are given."""
        offset = 0 if tile.offset is None else tile.offset.data_ptr()
        part_dot, dot = (0, 0) if dot_C is None else (rows[0][2].data_ptr(), dot_C.data_ptr())
        self._queue("merge", tile, _pieces(*rows), _pieces(*columns), part_dot, offset, dot)

    def _cosines(self, tile: Tile, out_CS: Tensor) -> Any:
        """The product into `out_CS`, and what the library has to know about it."""
        product(tile.x_CD, tile.y_SD.T, out=out_CS)
        return self._described(tile, out_CS)

    def _described(self, tile: Tile, cosines_CS: Tensor) -> Any:
        return self._library.Tile(*tile.described(cosines_CS))

    def _products(self, tile: Tile) -> Tensor:
        like = tile.x_CD.new_empty(0, dtype=self.dtype)
        return self._room("S", len(tile.x_CD), len(tile.y_SD), like)

    def _room(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) of a buffer that only grows, rows aligned."""
        stride = -(-columns // ALIGNED_ENTRIES) * ALIGNED_ENTRIES
        flat = self._pool.get(name)
        if flat is None or flat.numel() < rows * stride:
            flat = self._pool[name] = like.new_empty(rows * stride)
        return flat[: rows * stride].view(rows, stride)[:, :columns]

    def _room_for_sums(self, cosines: Any, tile: Tile, wanted: bool) -> Tensor:
        down, across = cosines.pieces
        warps = down * across * self._library.WARPS
        return tile.scale.new_empty((2, warps if wanted else 0))

    def _scalars(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of G * cos and of G over all warps; empty where there are none."""
        dot, total = sums.sum(dim=1) if sums.numel() else sums
        return dot, total


def _wide(tile: Tile) -> Tile:
    """Scalars in float32; the result must live until the kernels that read them are queued."""
    offset = None if tile.offset is None else tile.offset.float()
    return tile._replace(scale=tile.scale.float(), offset=offset)


def _addresses(lines: Sequence[Tensor] | Tensor) -> tuple[int, ...]:
    return tuple(line.data_ptr() for line in lines)


def _pieces(part: Tensor | None, running: SoftmaxStats | None) -> tuple[int, ...]:
    """So many pieces of so many lines, their maxima and sums, and what these are merged into."""
    if part is None or running is None:
        return 0, 0, 0, 0, 0, 0
    return *part.shape[1:], *_addresses(part[:2]), *_addresses(running)


def _place(matrix: Tensor | None) -> tuple[int, int, int]:
    if matrix is None:
        return 0, 0, 0
    return matrix.data_ptr(), matrix.stride(0), TYPES[matrix.dtype]
