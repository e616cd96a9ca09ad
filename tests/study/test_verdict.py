"""Verdicts: what intervals over a few seeds allow to be said."""

import math

import pytest

from fastclip.study.verdict import Verdict, half_width, negligible, positive, together


def test_the_interval_is_student_t() -> None:
    # two degrees of freedom: 4.3027 in every table; the deviation of 1, 2, 3 is 1
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert half_width([0.3]) == math.inf


@pytest.mark.parametrize(
    "values, margin, answer",
    [
        ([0.10, 0.11, 0.12], 0.0, "shows"),
        ([-0.10, -0.11, -0.12], 0.0, "does not show"),
        ([0.10, 0.11, 0.12], 0.09, "unclear"),
        ([0.10, 0.11, 0.12], 0.05, "shows"),
        ([0.01, 0.02, 0.03], 0.1, "does not show"),
        # all three above nothing, and yet too far apart
        ([0.01, 0.05, 0.20], 0.0, "unclear"),
        ([0.5], 0.0, "unclear"),
    ],
)
def test_positive(values: list[float], margin: float, answer: str) -> None:
    assert positive("it helps", "gain", values, margin).answer == answer


@pytest.mark.parametrize(
    "values, answer",
    [
        ([0.001, -0.001, 0.0], "shows"),
        ([0.10, 0.11, 0.12], "does not show"),
        ([-0.10, -0.11, -0.12], "does not show"),
        ([0.02, 0.03, 0.04], "unclear"),
        ([0.0], "unclear"),
    ],
)
def test_negligible(values: list[float], answer: str) -> None:
    assert negligible("it does little", "change", values, 0.03).answer == answer


def test_the_numbers_are_said() -> None:
    assert str(positive("it helps", "gain", [0.10, 0.11, 0.12])) == (
        "**shows**: it helps (gain +11.0 ± 2.5 points)"
    )
    assert "one seed" in str(positive("it helps", "gain", [0.5]))


@pytest.mark.parametrize(
    "answers, whole",
    [
        (("shows", "shows"), "shows"),
        (("shows", "unclear"), "unclear"),
        (("unclear", "does not show"), "does not show"),
    ],
)
def test_together(answers: tuple, whole: str) -> None:
    assert together("all", [Verdict("a", answer, "") for answer in answers]).answer == whole
