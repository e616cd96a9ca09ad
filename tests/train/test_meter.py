"""The time left of a run: steady, without the first steps, and of the steps of now."""

import math
from itertools import pairwise

import pytest

from fastclip.train.meter import Pace


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
