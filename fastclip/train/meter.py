"""The speed of a run."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


class Meter:
    """Samples a second and the share of time spent waiting for data, between two readings.

    What lies between `pause` and `resume`, an evaluation and a checkpoint, is no part of either.

    Args:
        batch_size: samples of a step over all ranks.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def waiting(
        self,
        steps: Iterator[list[dict[str, Any]]],
        watched: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[list[dict[str, Any]]]:
        """The same steps; `watched` is entered around each wait for one."""
        while True:
            before = time.perf_counter()
            with watched():
                batches = next(steps, None)
            self.waited += time.perf_counter() - before
            if batches is None:
                return
            yield batches

    def step(self) -> None:
        """Count a step."""
        self.steps += 1

    def pause(self) -> None:
        """Stop the clock."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        """Start the clock again."""
        self.started += time.perf_counter() - self.paused

    def read(self, device: torch.device) -> dict[str, float]:
        """What was measured since the last reading, and the peak memory of this process."""
        elapsed = time.perf_counter() - self.started
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            # kilobytes on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        values = {
            "samples_per_second": self.steps * self.batch_size / elapsed,
            "data_wait": self.waited / elapsed,
            "peak_memory_gib": peak / 2**30,
        }
        self._reset()
        return values
