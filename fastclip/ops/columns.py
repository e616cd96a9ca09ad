"""Where the columns of S come from: this process, all processes at once, or one after the other.

Columns stand in blocks (views and texts; true captions and hard negatives), and inside a block
in the order of the ranks. A loop over S asks for parts, each some columns with their features, and
gives back each part's gradient; `own_gradient` then is the sum for this rank's columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastclip.ops import collectives
from fastclip.ops.collectives import Ranks, Swap
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.tiles.base import SoftmaxStats

_FEATURES, _GRADIENTS = 1, 2  # tags of the two kinds of tensors that travel at a time


class Segment(NamedTuple):
    """Rows [start, stop) of a part are the columns of S from `column` on, all of one block."""

    start: int
    stop: int
    column: int
    block: int


class Part(NamedTuple):
    """Some columns, whole in memory."""

    features: Tensor
    segments: list[Segment]
    owner: int | None = None


@dataclass(frozen=True)
class Layout:
    """The columns of S: sizes[b][q] columns of block b belong to rank q."""

    sizes: tuple[tuple[int, ...], ...]
    rank: int

    def start(self, block: int, rank: int) -> int:
        """The first column of a rank in a block."""
        return sum(sum(sizes) for sizes in self.sizes[:block]) + sum(self.sizes[block][:rank])

    def columns(self, rank: int | None = None) -> int:
        """The number of columns, of one rank's or all."""
        return sum(sum(sizes) if rank is None else sizes[rank] for sizes in self.sizes)

    def of_rank(self, rank: int) -> list[Segment]:
        """A rank's columns, its blocks one after the other."""
        stops = accumulate(sizes[rank] for sizes in self.sizes)
        segments = []
        for block, stop in enumerate(stops):
            start = stop - self.sizes[block][rank]
            segments.append(Segment(start, stop, self.start(block, rank), block))
        return [segment for segment in segments if segment.start < segment.stop]

    def of_all(self) -> list[Segment]:
        """All columns in their order."""
        totals = [(block, self.start(block, 0), sum(s)) for block, s in enumerate(self.sizes)]
        return [Segment(start, start + n, start, block) for block, start, n in totals if n > 0]


class Columns(Protocol):
    """A source of columns; one instance serves one call of an operator."""

    layout: Layout

    def collect(self, own: Tensor) -> Tensor:
        """What is to be kept from the forward to the backward, besides this rank's columns."""

    def parts(self, own: Tensor, collected: Tensor) -> Iterator[Part]:
        """All columns, part by part; a part is valid until the next is asked for."""

    def give(self, part: Part, gradient: Tensor, dtype: torch.dtype) -> None:
        """The gradient of a part, to be sent in `dtype`; it may be overwritten."""

    def own_gradient(self) -> Tensor:
        """The sum of what all ranks gave for this rank's columns."""

    def own_statistics(self, found: SoftmaxStats) -> SoftmaxStats:
        """Statistics of this rank's columns of the first block, from every rank's of all."""

    def of_all_ranks(self, own: Tensor) -> Tensor:
        """What every rank has for its columns, (own columns, ...), in the order of the columns.

        It may be of the first block only.
        """

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the ranks of a small tensor."""


def columns_of(ranks: Ranks | None, blocks: Sequence[int]) -> Columns:
    """The source for these ranks, where this one has blocks[b] columns in block b."""
    if ranks is None:
        return LocalColumns(Layout(tuple((size,) for size in blocks), 0))
    layout = Layout(tuple(ranks.columns(size) for size in blocks), ranks.rank)
    return (Gathered if ranks.exchange == "gather" else Ring)(layout, ranks.group)


class LocalColumns:
    """One process: its columns are all."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._gradient: Tensor | None = None

    def collect(self, own: Tensor) -> Tensor:
        return own.new_empty(0)

    def parts(self, own: Tensor, collected: Tensor) -> Iterator[Part]:
        yield Part(own, self.layout.of_all())

    def give(self, part: Part, gradient: Tensor, dtype: torch.dtype) -> None:
        self._gradient = gradient

    def own_gradient(self) -> Tensor:
        assert self._gradient is not None
        return self._gradient

    def own_statistics(self, found: SoftmaxStats) -> SoftmaxStats:
        return found

    def of_all_ranks(self, own: Tensor) -> Tensor:
        return own

    def sum(self, own: Tensor) -> Tensor:
        return own


class _Shared:
    """What both exchanges have in common."""

    def __init__(self, layout: Layout, group: str) -> None:
        self.layout, self.group, self.rank = layout, group, layout.rank
        self.world = len(layout.sizes[0])

    def own_statistics(self, found: SoftmaxStats) -> SoftmaxStats:
        sizes = self.layout.sizes[0]
        own, others = collectives.split_own(torch.stack(found, dim=1), sizes, self.rank)
        received = collectives.all_to_all_rows(self.group, others, sizes, self.rank)
        received.insert(self.rank, own)
        merged = SoftmaxStats.empty(sizes[self.rank], found.max, found.max.dtype)
        for pairs in received:
            merged.merge_(*pairs.unbind(dim=1))
        return merged

    def of_all_ranks(self, own: Tensor) -> Tensor:
        parts = [
            collectives.all_gather_rows(
                self.group, own[s.start : s.stop], self.layout.sizes[s.block]
            )
            for s in self.layout.of_rank(self.rank)
            if s.start < len(own)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def sum(self, own: Tensor) -> Tensor:
        return collectives.all_reduce_sum(self.group, own)


class Gathered(_Shared):
    """All ranks' columns at once."""

    def collect(self, own: Tensor) -> Tensor:
        everything = own.new_empty((self.layout.columns(), *own.shape[1:]))
        for segment, target in zip(
            self.layout.of_rank(self.rank), self.layout.of_all(), strict=True
        ):
            collectives.all_gather_rows(
                self.group,
                own[segment.start : segment.stop],
                self.layout.sizes[segment.block],
                out=everything[target.start : target.stop],
            )
        return everything

    def parts(self, own: Tensor, collected: Tensor) -> Iterator[Part]:
        yield Part(collected, self.layout.of_all())

    def give(self, part: Part, gradient: Tensor, dtype: torch.dtype) -> None:
        sizes = [self.layout.columns(rank) for rank in range(self.world)]
        # what stays here is not rounded
        own = gradient.new_empty((sizes[self.rank], *gradient.shape[1:]))
        outgoing = gradient.new_empty((sum(sizes) - len(own), *gradient.shape[1:]), dtype=dtype)
        room = outgoing.split([size * (q != self.rank) for q, size in enumerate(sizes)])
        for rank in range(self.world):
            block = own if rank == self.rank else room[rank]
            for s in self.layout.of_rank(rank):
                length = s.stop - s.start
                block[s.start : s.stop] = gradient[s.column : s.column + length]
        received = collectives.all_to_all_rows(self.group, outgoing, sizes, self.rank)
        received.insert(self.rank, own)
        self._gradient = torch.zeros_like(own)
        for block in received:
            self._gradient += block

    def own_gradient(self) -> Tensor:
        return self._gradient


class Ring(_Shared):
    """One rank's columns after the other, each sent on while it is worked with."""

    def __init__(self, layout: Layout, group: str) -> None:
        super().__init__(layout, group)
        self._under_way: Swap | None = None

    def collect(self, own: Tensor) -> Tensor:
        return own.new_empty(0)

    def parts(self, own: Tensor, collected: Tensor) -> Iterator[Part]:
        block = own.contiguous()
        for step in range(self.world):
            owner = (self.rank - step) % self.world
            swap = None
            if step < self.world - 1:
                rows = self.layout.columns((owner - 1) % self.world)
                swap = Swap(
                    self.group,
                    block,
                    (self.rank + 1) % self.world,
                    block.new_empty((rows, *block.shape[1:])),
                    (self.rank - 1) % self.world,
                    _FEATURES,
                )
            yield Part(block, self.layout.of_rank(owner), owner)
            if swap is not None:
                block = swap.wait()

    def give(self, part: Part, gradient: Tensor, dtype: torch.dtype) -> None:
        assert part.owner is not None
        if part.owner == self.rank:
            self._gradient = gradient
            return
        self._settle()
        step = (self.rank - part.owner) % self.world
        outgoing = gradient.to(dtype)
        self._under_way = Swap(
            self.group,
            outgoing,
            part.owner,
            outgoing.new_empty(self._gradient.shape),
            (self.rank + step) % self.world,
            _GRADIENTS,
        )

    def own_gradient(self) -> Tensor:
        self._settle()
        return self._gradient

    def _settle(self) -> None:
        if self._under_way is not None:
            self._gradient += self._under_way.wait()
            self._under_way = None


def exchange_dtype(compute_dtype: torch.dtype, *, scaled: bool) -> torch.dtype:
    """In which dtype partial gradients travel.

    That of the features; but float16 only once the upstream gradient, and with it the loss scale,
    is on (`scaled`): before, most of it would be flushed to zero.
    """
    if compute_dtype == torch.float16 and not scaled:
        return accumulator_dtype(compute_dtype)
    return compute_dtype
