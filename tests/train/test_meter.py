"""The speed of a run: waits for data, and the time left, steady and of the steps of now."""

import math
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastclip.train import meter
from fastclip.train.meter import Meter, Pace


def estimates(seconds: list[float], every: int) -> list[float]:
    """Seconds a step as estimated after each interval of so many steps."""
    pace, found = Pace(), []
    for start in range(0, len(seconds), every):
        part = seconds[start : start + every]
        pace.add(len(part), math.fsum(part))
        found.append(pace.seconds(1))
    return found


@pytest.mark.parametrize("every", [1, 5, 10, 50])
def test_first_steps_are_left_out_and_others_smoothed(every: int) -> None:
    """Two steps of compilation; then every fifth step takes eleven times as long."""
    steps = [60.0, 30.0, *([1.0, 1.0, 1.0, 1.0, 11.0] * 60)]
    found = estimates(steps, every)
    # once enough is known the mean, which is 3, and no jumps from one to the next
    settled = found[30 // every + 1 :]
    assert all(2 < each < 4 for each in settled), settled
    assert all(abs(b / a - 1) < 0.35 for a, b in pairwise(settled))
    late = found[150 // every :]
    assert all(abs(each / 3 - 1) < 0.15 for each in late), late


def test_another_speed_is_followed() -> None:
    """As where another job has begun: the steps of an hour ago say little of the next."""
    found = estimates([1.0] * 500 + [3.0] * 150, 1)
    assert found[499] == pytest.approx(1) and found[510] < 1.7 and found[-1] > 2.8


def test_a_run_that_has_only_its_first_steps_is_estimated_by_them() -> None:
    assert Pace().seconds(5) == 0
    assert estimates([9.0, 2.0, 2.0], 1) == [9.0, 2.0, 2.0]
    assert estimates([9.0, 2.0, 2.0, 2.0], 4) == [3.75]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = 0.0

    def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now)
    return passing


def test_the_share_of_waiting_for_data(clock: Callable[[float], None]) -> None:
    entered = []

    @contextmanager
    def watched() -> Iterator[None]:
        entered.append("begun")
        clock(0.25)
        yield
        entered.append("ended")

    def steps() -> Iterator[list[dict[str, Any]]]:
        for number, seconds in enumerate((3.0, 1.0)):
            clock(seconds)
            yield [{"number": number}]

    measured = Meter(batch_size=8)
    for number, batches in enumerate(measured.waiting(steps(), watched)):
        assert batches == [{"number": number}] and entered[-1] == "ended"
        clock(0.75)
        measured.step()
    # one wait more, for the end
    assert entered == ["begun", "ended"] * 3
    values = measured.read(torch.device("cpu"))
    assert values["data_wait"] == (4 + 3 * 0.25) / (4 + 3 * 0.25 + 1.5)
    assert values["samples_per_second"] == 16 / 6.25
    assert measured.pace.seconds(1) == 6.25 / 2
    # of what follows alone
    clock(2.0)
    measured.step()
    values = measured.read(torch.device("cpu"))
    assert values["data_wait"] == 0 and values["samples_per_second"] == 4


def test_the_peak_of_memory_is_the_processs(clock: Callable[[float], None]) -> None:
    def peak() -> float:
        """In GiB; the system says KiB, on macOS bytes."""
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    measured, before = Meter(batch_size=8), peak()
    clock(1.0)
    assert before <= measured.read(torch.device("cpu"))["peak_memory_gib"] <= peak()
