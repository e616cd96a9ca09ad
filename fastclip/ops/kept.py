"""Exponentials of S that the forward keeps for the backward, so that S is formed once.

    E_ij = exp(S_ij - anchor)        G_ij = scale * E_ij * (u_i + v_j)

One anchor serves all rows and columns. Features of length 1 have |S| <= |scale|, so that it can be
chosen in advance: no E overflows, and what is flushed to zero is far below a rounding of any sum
that is in range. Where a row's or a column's sum is not, or a factor u or v is not, S is formed
again and each row and column has its own maximum: nothing is assumed about features or scale.

On a CPU that is decided for each part of the columns, from sums that are read. Triton's kernels
have an anchor a tile, and decide on the device and for each of their tiles: no number is read.
`cuda` has its products in memory before it makes anything of them, and keeps these: they are S
itself, not rounded, so there is nothing to decide.

Shape suffixes: N rows, C those of a chunk, Q columns of a chunk's G, P domains.
"""

from contextlib import AbstractContextManager
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.ops import checks
from fastclip.ops.chunks import with_budgets
from fastclip.ops.gemm import accumulator_dtype, gradient_dtype
from fastclip.ops.problem import Options, Problem, columns_of_all
from fastclip.ops.registration import wants_gradient
from fastclip.ops.schedule import Chunk, highest_strip, strip_rows
from fastclip.ops.tiles.base import LogSumExps

# Fixed, so that memory is linear in the batch plus a constant.
KEEP_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# those that keep, and on which devices; on a CPU Triton's is the interpreter, `cuda` an emulation
IMPLEMENTATIONS = {
    "torch": ("cpu",),
    "cpp": ("cpu",),
    "triton": ("cuda", "cpu"),
    "cuda": ("cuda", "cpu"),
}
# where lines of a GPU's kernels start
ALIGNED = 16
# Triton's store their tiles whole: so far beyond the last row and column at the most.
OVERHANG = 256
MARGIN = OVERHANG + ALIGNED


def switched_off() -> AbstractContextManager[None]:
    """Inside, nothing is kept where a call does not say how much: memory is linear in the batch."""
    return with_budgets(KEEP_BYTES)


class Kept(NamedTuple):
    """What the forward saves.

    entries: E of every visit, or its products, chunk after chunk; empty where nothing is kept.
    anchors: of each part, infinite where its sums were out of range; empty where tiles have their
    own or need none.
    """

    entries: Tensor
    anchors: Tensor

    @property
    def by_tile(self) -> bool:
        """Whether entries are kept whose tiles, not the host, say which of them can be used."""
        return self.entries.numel() > 0 and not self.anchors.numel()

    def rooms(self, options: Options) -> "Rooms":
        """The rooms of chunks, in the order of their visits."""
        overhang = 0 if keeps_products(options) else OVERHANG
        return Rooms(self.entries, *((ALIGNED, overhang) if self.by_tile else (1, 0)))


class Rooms:
    """Hands out a flat tensor, a chunk at a time.

    Where tiles are stored whole, what lies beyond a chunk's last row is the next one's, which is
    stored later.
    """

    def __init__(self, entries: Tensor, aligned: int, overhang: int) -> None:
        self._entries, self._at, self._aligned, self._overhang = entries, 0, aligned, overhang

    def next(self, chunk: Chunk, columns: int) -> Tensor:
        """E of a chunk of a part with so many columns, in the shape of its G."""
        rows, columns = chunk.rows.stop - chunk.rows.start, columns - chunk.first
        stride = -(-columns // self._aligned) * self._aligned + self._overhang
        start, self._at = self._at, self._at + rows * stride
        return self._entries[start : self._at].view(rows, stride)[:, :columns]


def keep_argument(keep_bytes: int | None, backend: str, *inputs: Tensor | None) -> int:
    """The budget of a call, 0 where no gradient is wanted or the implementation keeps nothing."""
    checks.check_keep_bytes(keep_bytes)
    device = next(i.device.type for i in inputs if i is not None)
    keeps = device in IMPLEMENTATIONS.get(backend, ())
    if not keeps or not any(wants_gradient(*inputs)):
        return 0
    return KEEP_BYTES[device] if keep_bytes is None else keep_bytes


def kept_entries(own: int, columns: int, options: Options) -> int:
    """How many entries are kept of own rows: all that are visited, or none if they do not fit."""
    if not options.keep_bytes or options.maxima:
        return 0
    itemsize, by_tile = _dtype(options).itemsize, _by_tile(options)
    triangle = options.domains and not options.exchange
    if triangle:
        block, widest, parts = own // len(options.domains), own, 1
        if by_tile:
            strip = highest_strip(block, own)
        else:
            strip = strip_rows(block, own, itemsize, options.chunk_bytes, "cpu")
        # half of S, and the lower half of the square that each strip has of its own
        count = own * (own + strip) // 2
    else:
        widest, parts = columns_of_all(columns, options), options.parts
        count = own * widest
    if keeps_products(options):
        # lines start aligned
        exact = parts == 1 and not triangle
        count += own * (-widest % ALIGNED if exact else parts * (ALIGNED - 1))
    elif by_tile:
        count = in_whole_tiles(count, own, widest, parts)
    return count if count * itemsize <= options.keep_bytes else 0


def in_whole_tiles(count: int, own: int, columns: int, parts: int) -> int:
    """The room that so many entries of own rows take: columns, in so many parts."""
    return count + parts * own * MARGIN + OVERHANG * (columns + MARGIN)


def room_to_keep(problem: Problem) -> Kept:
    """Allocate what the forward fills."""
    x_ND, options = problem.x_ND, problem.options
    count = kept_entries(len(x_ND), len(problem.y_MD), options)
    entries = x_ND.new_empty(count, dtype=_dtype(options))
    return Kept(entries, entries.new_full((_anchors(options),), torch.inf))


def fake_kept(own: Tensor, columns: Tensor, options: Options) -> list[Tensor]:
    """Tensors of the shapes of `Kept`."""
    counts = kept_entries(own.shape[0], columns.shape[0], options), _anchors(options)
    return [own.new_empty(count, dtype=_dtype(options)) for count in counts]


def anchor_of(problem: Problem) -> Tensor | None:
    """The anchor, 0-d; None where logits may lie too far apart for one."""
    scale_PP = problem.scale_PP.abs()
    offset_PP = torch.zeros_like(scale_PP) if problem.offset_PP is None else problem.offset_PP
    top, bottom = (offset_PP + scale_PP).max(), (offset_PP - scale_PP).min()
    span = top - bottom
    for bias in (problem.row_bias, problem.column_bias):
        # exponentials are weighed by those of biases, which must not vanish where S is high
        if bias is not None and not _exponential_is_normal(bias):
            return None
    reach = _reach(span.dtype)
    # far beyond what any anchor serves, nothing is tried
    if not span <= 6 * reach:
        return None
    return top - (span / 2).clamp(max=reach)


def sums_in_range(sums: Tensor) -> bool:
    """Whether every sum is large enough for what was flushed to 0 in it not to matter, and finite.

    In float32 from 2^-80 to 2^127; NaN is not.
    """
    info = torch.finfo(sums.dtype)
    return bool(((sums >= info.tiny / info.eps**2) & (sums < info.max / 2)).all())


def factors(
    problem: Problem, kept: Kept, rows: LogSumExps, columns: LogSumExps | None
) -> tuple[Tensor, Tensor | None] | None:
    """u and v, or None where no E is used with them: nothing kept, or a factor out of range."""
    if not kept.entries.numel() or kept.by_tile:
        return None
    anchors = kept.anchors[kept.anchors.isfinite()]
    if not len(anchors):
        return None
    u_N = rows.upstream * torch.exp(anchors[0] - rows.lse)
    v_M = u_N if columns is rows else None
    if columns is not None and columns is not rows:
        v_M = columns.upstream * torch.exp(anchors[0] - columns.lse)
    scale_PP = problem.scale_PP.abs()
    bounds = scale_PP.min(), scale_PP.max()
    given = [u_N] if v_M is None or v_M is u_N else [u_N, v_M]
    return (u_N, v_M) if all(_factors_in_range(one, *bounds) for one in given) else None


def keeps_products(options: Options) -> bool:
    """Whether it is the products that are kept, not exponentials of S."""
    return options.backend == "cuda"


def _by_tile(options: Options) -> bool:
    return options.backend in ("triton", "cuda")


def _anchors(options: Options) -> int:
    return 0 if _by_tile(options) else options.parts


def _dtype(options: Options) -> torch.dtype:
    """That of E: G's, so that they are rounded alike; of products the accumulator's."""
    return (gradient_dtype if options.backend == "triton" else accumulator_dtype)(options.dtype)


def _factors_in_range(factor: Tensor, least_scale: Tensor, greatest_scale: Tensor) -> bool:
    least = torch.finfo(factor.dtype).tiny * 2**16
    size = factor.abs()
    inside = (size * least_scale >= least) & (size * greatest_scale <= 1 / least)
    return bool((inside | (size == 0)).all())


def _exponential_is_normal(bias: Tensor) -> bool:
    """Whether the exponential of every bias that is not -inf is a normal number; they are <= 0."""
    least = log(torch.finfo(bias.dtype).tiny)
    return bool(((bias >= least) | (bias == -torch.inf)).all())


def _reach(dtype: torch.dtype) -> float:
    """How far above the anchor a logit may lie: its exp, 2^100 in float32, leaves room for sums."""
    return log(torch.finfo(dtype).max) * 100 / 128
