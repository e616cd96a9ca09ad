"""Exponentials of S that the forward keeps for the backward, so that S is formed once.

    E_ij = exp(S_ij - anchor)        G_ij = scale * E_ij * (u_i + v_j)

One anchor serves all rows and columns. Features of length 1 have |S| <= |scale|, so that it can be
chosen in advance: no E overflows, and what is flushed to zero is far below a rounding of any sum
that is in range. Where a row's or a column's sum is not, or a factor u or v is not, S is formed
again and each row and column has its own maximum: nothing is assumed about features or scale.

Shape suffixes: N rows, C those of a chunk, Q columns of a chunk's G, P domains.
"""

from contextlib import AbstractContextManager
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.ops import checks
from fastclip.ops.chunks import without
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.problem import Options, Problem, columns_of_all
from fastclip.ops.registration import wants_gradient
from fastclip.ops.schedule import Chunk, strip_rows
from fastclip.ops.tiles.base import LogSumExps

# Fixed, so that memory is linear in the batch plus a constant.
KEEP_BYTES = {"cpu": 64 << 20}
# those with `exponentials` and `weigh`, and the device they keep on
IMPLEMENTATIONS = {"torch": "cpu", "cpp": "cpu"}


def switched_off() -> AbstractContextManager[None]:
    """Inside, nothing is kept where a call does not say how much: memory is linear in the batch."""
    return without(KEEP_BYTES)


class Kept(NamedTuple):
    """What the forward saves.

    entries: E of every visit, chunk after chunk; empty where nothing is kept. anchors: of each
    part, infinite where its sums were out of range.
    """

    entries: Tensor
    anchors: Tensor

    def rooms(self) -> "Rooms":
        """The rooms of chunks, in the order of their visits."""
        return Rooms(self.entries)


class Rooms:
    """Hands out a flat tensor, a chunk at a time."""

    def __init__(self, entries: Tensor) -> None:
        self._entries, self._at = entries, 0

    def next(self, chunk: Chunk, columns: int) -> Tensor:
        """E of a chunk of a part with so many columns, in the shape of its G."""
        shape = chunk.rows.stop - chunk.rows.start, columns - chunk.first
        start, self._at = self._at, self._at + shape[0] * shape[1]
        return self._entries[start : self._at].view(shape)


def keep_argument(keep_bytes: int | None, backend: str, *inputs: Tensor | None) -> int:
    """The budget of a call, 0 where no gradient is wanted or the implementation keeps nothing."""
    checks.check_keep_bytes(keep_bytes)
    device = next(i.device.type for i in inputs if i is not None)
    if IMPLEMENTATIONS.get(backend) != device or not any(wants_gradient(*inputs)):
        return 0
    return KEEP_BYTES[device] if keep_bytes is None else keep_bytes


def kept_entries(own: int, columns: int, options: Options) -> int:
    """How many entries are kept of own rows: all that are visited, or none if they do not fit."""
    if not options.keep_bytes or options.maxima:
        return 0
    itemsize = accumulator_dtype(options.dtype).itemsize
    if options.domains and not options.exchange:
        block, device = own // len(options.domains), IMPLEMENTATIONS[options.backend]
        strip = strip_rows(block, own, itemsize, options.chunk_bytes, device)
        # half of S, and the lower half of the square that each strip has of its own
        count = own * (own + strip) // 2
    else:
        count = own * columns_of_all(columns, options)
    return count if count * itemsize <= options.keep_bytes else 0


def room_to_keep(problem: Problem) -> Kept:
    """Nothing kept yet."""
    x_ND, dtype = problem.x_ND, problem.tiles.dtype
    count = kept_entries(len(x_ND), len(problem.y_MD), problem.options)
    entries = x_ND.new_empty(count, dtype=dtype)
    return Kept(entries, entries.new_full((problem.options.parts,), torch.inf))


def fake_kept(own: Tensor, columns: Tensor, options: Options) -> list[Tensor]:
    """Tensors of the shapes of `Kept`."""
    dtype = accumulator_dtype(options.dtype)
    entries = kept_entries(own.shape[0], columns.shape[0], options)
    return [own.new_empty(count, dtype=dtype) for count in (entries, options.parts)]


def anchor_of(problem: Problem) -> Tensor | None:
    """The anchor, 0-d; None where logits may lie too far apart for one."""
    scale_PP = problem.scale_PP.abs()
    offset_PP = torch.zeros_like(scale_PP) if problem.offset_PP is None else problem.offset_PP
    top, bottom = (offset_PP + scale_PP).max(), (offset_PP - scale_PP).min()
    span = top - bottom
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
    """u and v, or None where E is of no use: nothing kept, or a factor out of range."""
    if not kept.entries.numel():
        return None
    anchors = kept.anchors[kept.anchors.isfinite()]
    if not len(anchors):
        return None
    u_N = rows.weight * torch.exp(anchors[0] - rows.lse)
    v_M = u_N if columns is rows else None
    if columns is not None and columns is not rows:
        v_M = columns.weight * torch.exp(anchors[0] - columns.lse)
    scale_PP = problem.scale_PP.abs()
    bounds = scale_PP.min(), scale_PP.max()
    given = [u_N] if v_M is None or v_M is u_N else [u_N, v_M]
    return (u_N, v_M) if all(_factors_in_range(one, *bounds) for one in given) else None


def _factors_in_range(factor: Tensor, least_scale: Tensor, greatest_scale: Tensor) -> bool:
    least = torch.finfo(factor.dtype).tiny * 2**16
    size = factor.abs()
    inside = (size * least_scale >= least) & (size * greatest_scale <= 1 / least)
    return bool((inside | (size == 0)).all())


def _reach(dtype: torch.dtype) -> float:
    """How far above the anchor a logit may lie: its exp, 2^100 in float32, leaves room for sums."""
    return log(torch.finfo(dtype).max) * 100 / 128
