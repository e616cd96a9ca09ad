"""What the loader processes are reading, to report it when one hangs or dies."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info


class LoaderDiedError(OSError):
    """A loader process has died; the message names what it was reading."""


class ReadingBoard:
    """Which shard each loader process is reading, and since when, in memory that all share.

    Args:
        workers: loader processes that have a line; 0 where the training process loads.
    """

    def __init__(self, workers: int = 0) -> None:
        # shard, or -1; when it began, in nanoseconds of the machine's clock; process
        self._rows = torch.full((max(1, workers), 3), -1, dtype=torch.int64).share_memory_()

    @contextmanager
    def reading(self, shard: int) -> Iterator[None]:
        """Around the reading of one sample."""
        worker = get_worker_info()
        number = worker.id if worker else 0
        if number >= len(self._rows):
            # a process of a loader of someone else's
            yield
            return
        row = self._rows[number].numpy()
        row[1], row[2], row[0] = time.monotonic_ns(), os.getpid(), shard
        yield
        # after an error the row stays until the next sample: a caller may ask what was being read
        row[0] = -1

    def describe(self, place: Callable[[int], str], process: int | None = None) -> str:
        """A clause on each process that is reading, or on one; the one that began first, first."""
        now = time.monotonic_ns()
        rows = sorted((started, shard, pid) for shard, started, pid in self._rows.tolist())
        return "; ".join(
            f"process {pid} has been reading {place(shard)} for {(now - started) / 1e9:.0f} s"
            for started, shard, pid in rows
            if shard >= 0 and process in (None, pid)
        )
