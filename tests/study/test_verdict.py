"""Verdicts: what intervals over a few seeds allow to be said."""

import math

import pytest

from fastclip.study.verdict import (
    Design,
    Verdict,
    compare,
    half_width,
    is_strong,
    power,
)


def test_the_interval_is_student_t() -> None:
    # two degrees of freedom: 4.3027 in every table; the deviation of 1, 2, 3 is 1
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert half_width([0.3]) == math.inf


@pytest.mark.parametrize(
    "values, smallest, answer",
    [
        ([0.10, 0.11, 0.12], 0.05, "shows"),
        ([-0.10, -0.11, -0.12], 0.05, "the other way"),
        # above nothing, and yet the interval, 0.085 to 0.135, is below what is of interest
        ([0.10, 0.11, 0.12], 0.15, "no larger effect"),
        # 0.085 to 0.135 reaches beyond it
        ([0.10, 0.11, 0.12], 0.12, "shows"),
        ([0.001, -0.001, 0.0], 0.01, "no larger effect"),
        # all three above nothing, and yet too far apart
        ([0.01, 0.05, 0.20], 0.03, "undecided"),
        ([0.5], 0.03, "undecided"),
    ],
)
def test_what_an_interval_says(values: list[float], smallest: float, answer: str) -> None:
    assert compare("it helps", "gain", values, smallest).answer == answer


def test_the_numbers_are_said() -> None:
    assert str(compare("it helps", "gain", [0.10, 0.11, 0.12], 0.03)) == (
        "**shows, as in the paper**: it helps (gain +11.0 ± 2.5 points; smallest effect of "
        "interest: 3.0)"
    )
    little = compare("it helps", "gain", [0.10, 0.11, 0.12], 0.03, "no larger effect")
    assert str(little).startswith("**shows, unlike the paper**: ")
    assert str(compare("it helps", "gain", [0.5], 0.03)).startswith("**undecided**: ")
    assert "one seed" in str(compare("it helps", "gain", [0.5], 0.03))
    assert str(Verdict("a", "too weak to compare", "b")) == "**too weak to compare**: a (b)"


@pytest.mark.parametrize("effect, seeds, known", [(1.0, 10, 0.8031), (0.5, 34, 0.8078)])
def test_power_is_the_tables(effect: float, seeds: int, known: float) -> None:
    # of a paired t-test at 0.05, both sides, in every textbook's table
    assert power(effect, 1.0, seeds) == pytest.approx(known, abs=2e-4)
    assert power(-2 * effect, 2.0, seeds) == pytest.approx(known, abs=2e-4)
    # the fewest that reach 0.8
    assert power(effect, 1.0, seeds - 1) < 0.8


@pytest.mark.parametrize("seeds", [2, 3, 5, 30])
def test_power_grows_with_the_effect_to_one(seeds: int) -> None:
    values = [power(effect, 1.0, seeds) for effect in (0.0, 0.1, 1.0, 3.0, 10.0, 30.0, 300.0)]
    assert values[0] == pytest.approx(0.05, abs=1e-3)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1, abs=1e-3)


def test_one_seed_has_no_power() -> None:
    assert power(1.0, 0.01, 1) == 0
    assert Design(seeds=1, smallest=0.03, spread=0.01).power == 0


def test_without_a_pilot_the_power_is_not_known() -> None:
    design = Design(seeds=3, smallest=0.03)
    assert design.power is None and "is not known" in str(design)


def test_an_arm_is_strong_half_way_to_the_best() -> None:
    assert is_strong(0.35, chance=0.1, best=0.6)
    assert not is_strong(0.34, chance=0.1, best=0.6)
