"""Tiles of the similarity matrix: what an implementation of the operators has to provide.

Every operator walks over S in tiles of C rows by S columns and needs five things of each tile:

    statistics   rows' and columns' (max, sum of exponentials), merged into running ones     K1
    gradient     G, the gradient of the tile's products, from given log-sum-exps             K2
    begin_rows,
    end_rows     both at once where a tile holds its rows whole (one product instead of two)
    sigmoid      softplus row sums and G of the sigmoid loss
    finish       products of G with features, plus positive terms, cast once                 K4

The walks (`rectangle.py`, `triangle.py`) and the products with G (K3, `gemm.py`) are common to
all implementations. `TorchTiles` here is the one that runs everywhere.

A logit is S = scale * cos + offset. The offset is never added to a tile: it goes into the
anchors, so that sums of G * cos need no subtraction.

Shape suffixes: C rows of a tile, S its columns, D feature width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype, as_operand, product

# Large enough that the products run at full speed and dY is swept few times, small enough that
# the sweeps over a chunk stay near the cache. Fixed, so that a shape has one summation order.
DEFAULT_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
MINIMUM_CHUNK_ROWS = 16
# more of them speed up no product; few columns would make a chunk the operator's peak
MOST_CHUNK_ROWS = {"cpu": 512}


class Tile(NamedTuple):
    """One tile: operands, the domain pair's scale and offset, and which entries are left out.

    The entry (c, c + diagonal) is no negative, nor are entries whose row and column ids agree.
    """

    x_CD: Tensor
    y_SD: Tensor
    scale: Tensor
    offset: Tensor | None
    diagonal: int | None
    row_id_C: Tensor | None = None
    column_id_S: Tensor | None = None

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


class Lines(NamedTuple):
    """Log-sum-exps of a tile's rows (or columns) and their upstream gradients."""

    lse: Tensor
    weight: Tensor


class Running(NamedTuple):
    """Maximum and sum of exp(logit - maximum) of some lines, over the tiles seen so far."""

    max: Tensor
    sum: Tensor

    @staticmethod
    def of(lines: int, like: Tensor, dtype: torch.dtype) -> "Running":
        """Over no tiles yet."""
        return Running(
            like.new_full((lines,), -torch.inf, dtype=dtype), like.new_zeros(lines, dtype=dtype)
        )

    def part(self, start: int, stop: int) -> "Running":
        """Some of the lines, as views."""
        return Running(self.max[start:stop], self.sum[start:stop])

    def merge_(self, maximum: Tensor, total: Tensor) -> None:
        """Add a tile's lines, in place."""
        merged = torch.maximum(self.max, maximum)
        anchor = finite(merged)
        self.sum.mul_(torch.exp(self.max - anchor)).add_(total * torch.exp(maximum - anchor))
        self.max.copy_(merged)

    def lse(self) -> Tensor:
        """The log-sum-exps; -inf for lines without negatives.

        NaN from a maximum of `largest_logit` on: neighbors are 2 apart there, so that exp(S - lse)
        has no digit, whatever a loss made of it would look like.
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

    def statistics(self, tile: Tile, rows: Running, columns: Running | None) -> None:
        """Merge the tile's lines into the running ones."""

    def gradient(
        self, tile: Tile, rows: Lines, columns: Lines | None, out_CS: Tensor, scalars: bool
    ) -> tuple[Tensor, Tensor]:
        """G times the scale into `out_CS`; the sums of G * cos and of G if `scalars`."""

    def begin_rows(self, tile: Tile) -> tuple[Running, Tensor]:
        """Statistics of a tile without offset that holds its rows whole; sum of exp(S - max) * cos.

        The sum is over the columns, (C,).
        """

    def end_rows(self, factor_C: Tensor, out_CS: Tensor) -> None:
        """factor * exp(S - max) of the tile that began last, into `out_CS`."""

    def sigmoid(
        self, tile: Tile, weight_C: Tensor, out_CS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row sums of softplus(S); where `out_CS` is given G times the scale goes there.

        G = weight * sigmoid(S); the other two results are its sums with cos and alone.
        """

    def finish(
        self, total_CD: Tensor, terms: Sequence[tuple[Tensor, Tensor]], out_CD: Tensor
    ) -> None:
        """out = total + sum of coefficient_C * partner_CD, cast once; `total` is spent.

        `out_CD` may be `total_CD`.
        """

    def row_dot(self, a_CD: Tensor, b_CD: Tensor) -> Tensor:
        """Row-wise products in the accumulator's dtype, (C,)."""


class TorchTiles:
    """The `torch` implementation: any device torch runs on, every reduction in a fixed order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = accumulator_dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self._pool: dict[str, Tensor] = {}

    def operand(self, features: Tensor) -> Tensor:
        return as_operand(features)

    def gradient_operand(self, operand: Tensor) -> Tensor:
        return operand

    def gradient_buffer(self, rows: int, operand_SD: Tensor) -> Tensor:
        return self._buffer("G", rows, operand_SD.shape[0], operand_SD)

    def statistics(self, tile: Tile, rows: Running, columns: Running | None) -> None:
        S_CS = self._logits(tile)
        for dim, running in ((1, rows), (0, columns)):
            if running is None:
                continue
            maximum = S_CS.amax(dim=dim)
            exp_CS = self._exp(S_CS, finite(maximum).unsqueeze(dim))
            if tile.offset is not None:
                maximum += tile.offset
            running.merge_(maximum, exp_CS.sum(dim=dim))

    def gradient(
        self, tile: Tile, rows: Lines, columns: Lines | None, out_CS: Tensor, scalars: bool
    ) -> tuple[Tensor, Tensor]:
        S_CS = self._logits(tile)
        G_CS = out_CS if out_CS.dtype == self.dtype else self._like("g", S_CS)
        anchor_C, anchor_S = (
            None if lines is None else _without(finite(lines.lse), tile.offset)
            for lines in (rows, columns)
        )
        assert anchor_C is not None
        torch.sub(S_CS, anchor_C[:, None], out=G_CS).exp_()
        G_CS.mul_((rows.weight * tile.scale)[:, None])
        if columns is not None:
            assert anchor_S is not None
            # S stays, dscale needs it
            G_CS.addcmul_(self._exp(S_CS, anchor_S), columns.weight * tile.scale)
        return self._sums(tile, S_CS, G_CS, out_CS, scalars)

    def begin_rows(self, tile: Tile) -> tuple[Running, Tensor]:
        S_CS = self._logits(tile)
        maximum_C = S_CS.amax(dim=1)
        exp_CS = self._exp(S_CS, finite(maximum_C)[:, None])
        # -inf would make 0 * -inf
        self._leave_out(S_CS, tile, 0.0)
        dot_C = S_CS.mul_(exp_CS).sum(dim=1).div_(tile.scale)
        return Running(maximum_C, exp_CS.sum(dim=1)), dot_C

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
        if out_CS is None:
            row_C = softplus(z_CS, out=z_CS).sum(dim=1)
            none = row_C.new_empty(0)
            return row_C, none, none
        room_CS = out_CS if out_CS.dtype == self.dtype else self._like("g", S_CS)
        row_C = softplus(z_CS, out=room_CS).sum(dim=1)
        G_CS = torch.sigmoid(z_CS, out=z_CS).mul_((weight_C * tile.scale)[:, None])
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
        return torch.linalg.vecdot(a_CD.to(self.dtype), b_CD.to(self.dtype))

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
        if tile.row_id_C is not None and tile.column_id_S is not None:
            S_CS.masked_fill_(tile.row_id_C[:, None] == tile.column_id_S[None, :], value)

    def _exp(self, S_CS: Tensor, anchor: Tensor) -> Tensor:
        exp_CS = self._like("exp", S_CS)
        return torch.sub(S_CS, anchor, out=exp_CS).exp_()

    def _sums(
        self, tile: Tile, S_CS: Tensor, G_CS: Tensor, out_CS: Tensor, scalars: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums of G * cos and G, where `G_CS` holds G times the scale; spends `S_CS`."""
        if G_CS is not out_CS:
            out_CS.copy_(G_CS)
        if not scalars:
            none = S_CS.new_empty(0)
            return none, none
        scale = tile.scale
        total = G_CS.sum(dim=1).sum() / scale if tile.offset is not None else scale.new_zeros(())
        self._leave_out(S_CS, tile, 0.0)
        return S_CS.mul_(G_CS).sum(dim=1).sum() / scale / scale, total


def chunk_rows(rows: int, columns: int, itemsize: int, chunk_bytes: int, device_type: str) -> int:
    """Rows of S held at a time, `itemsize` bytes an entry; `chunk_bytes` 0 means the default."""
    budget = chunk_bytes or DEFAULT_CHUNK_BYTES.get(device_type, 64 << 20)
    fitting = max(budget // (columns * itemsize), 1 if chunk_bytes else MINIMUM_CHUNK_ROWS)
    if not chunk_bytes:
        fitting = min(fitting, MOST_CHUNK_ROWS.get(device_type, fitting))
    # equal chunks: a short last one would run its products at a worse rate
    count = -(-rows // fitting)
    size = -(-rows // count)
    return whole_tiles(size, fitting) if device_type == "cuda" else size


def whole_tiles(size: int, most: int) -> int:
    """Rows rounded to whole tiles of 128, up if `most` allows: aligned lines for the products."""
    up, down = -(-size // 128) * 128, size // 128 * 128
    return up if up <= most else max(down, min(size, 128))


def finished(
    tiles: Tiles, total: Tensor, terms: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    """`Tiles.finish`, in place where nothing is to be cast."""
    out = finished_room(total, dtype)
    tiles.finish(total, terms, out)
    return out


def finished_room(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Where `Tiles.finish` casts a spent total to: itself where nothing is to be cast."""
    return total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)


def chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of `size`."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


def largest_logit(dtype: torch.dtype) -> float:
    """The bound of |S| that is held in `dtype`."""
    return 2 / torch.finfo(dtype).eps


def away_from_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in the accumulator's dtype, with a magnitude that sums of G * S can be divided by.

    S of the least scale lies far below a rounding of any sum it enters, so statistics are those of
    a scale of 0, and the division still finds sums of G * cos: the scale's gradient.
    """
    scale = scale.to(dtype)
    least = torch.finfo(dtype).tiny ** 0.25
    return torch.where(scale.abs() < least, least, scale)


def finite(anchor: Tensor) -> Tensor:
    """-inf replaced by 0, so that -inf - anchor is -inf and not NaN; NaN stays."""
    return anchor.masked_fill(anchor == -torch.inf, 0)


def softplus(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """log(1 + exp(x)); torch's own is the identity above 20, an error of 2e-9 in float64."""
    if x.dtype == torch.float64:
        return torch.logaddexp(x, x.new_zeros(()), out=out)
    if out is None:
        return torch.nn.functional.softplus(x)
    return torch.ops.aten.softplus.out(x, out=out)


def tiles_of(backend: str, compute_dtype: torch.dtype) -> Tiles:
    """A new instance of the implementation of that name."""
    if backend == "triton":
        # triton is not everywhere
        from fastclip.ops.triton_tiles import TritonTiles

        return TritonTiles(compute_dtype)
    if backend == "cpp":
        # nor is the library
        from fastclip.ops.cpp_tiles import CppTiles

        return CppTiles(compute_dtype)
    if backend == "cuda":
        from fastclip.ops.cuda_tiles import CudaTiles

        return CudaTiles(compute_dtype)
    return TorchTiles(compute_dtype)


def _without(line: Tensor, offset: Tensor | None) -> Tensor:
    return line if offset is None else line - offset
