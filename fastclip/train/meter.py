"""The speed of a run."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


class Pace:
    """Seconds a step, by which the time left is estimated: a mean in which older steps fade.

    The first steps are slow (compilation, caches) and count only until others were made.
    """

    WARM_UP = 10
    # share of its weight that an interval keeps when another follows: about fifty are remembered
    KEPT = 0.98

    def __init__(self) -> None:
        self._made = self._from = 0
        self._steps = self._seconds = 0.0

    def add(self, steps: int, seconds: float) -> None:
        """Take in an interval of so many steps."""
        kept = self.KEPT
        if self._from < self.WARM_UP:
            kept, self._from = 0.0, self._made
        self._made += steps
        self._steps = kept * self._steps + steps
        self._seconds = kept * self._seconds + seconds

    def seconds(self, steps: int) -> float:
        """How long so many further steps will take; 0 before any was made."""
        return steps * self._seconds / max(1.0, self._steps)


class Meter:
    """Samples a second and the share of time spent waiting for data, between two readings.

    What lies between `pause` and `resume`, an evaluation and a checkpoint, is no part of either.

    Args:
        batch_size: samples of a step over all ranks.

    Attributes:
        pace: of all readings.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.pace = Pace()
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
        self.pace.add(self.steps, elapsed)
        self._reset()
        return values
