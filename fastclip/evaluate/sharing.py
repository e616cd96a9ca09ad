"""Evaluation by several processes: each encodes its share of the batches, all get everything."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import TypeVar

import torch.distributed as dist

_Item = TypeVar("_Item")

_together = False


@contextmanager
def together() -> Iterator[None]:
    """Inside, the ranks of the process group share the encoding; all of them must do the same.

    Without it a process encodes alone, as the first rank does when it validates during training.
    """
    global _together
    before, _together = _together, dist.is_available() and dist.is_initialized()
    try:
        yield
    finally:
        _together = before


def deal(items: Sequence[_Item]) -> Sequence[_Item]:
    """This rank's share of what all ranks hold, dealt round robin."""
    return items[dist.get_rank() :: dist.get_world_size()] if _together else items


def collect(share: Sequence[_Item]) -> list[_Item]:
    """What the ranks made of the items dealt to them, in the items' order, on all ranks."""
    if not _together:
        return list(share)
    shares: list[list[_Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, list(share))
    # the first ranks may have one more
    missing = object()
    rounds = chain.from_iterable(zip_longest(*shares, fillvalue=missing))
    return [item for item in rounds if item is not missing]  # type: ignore[misc]


def is_first() -> bool:
    """Whether this process talks to the user."""
    return not _together or dist.get_rank() == 0
