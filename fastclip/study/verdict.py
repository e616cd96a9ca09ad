"""What a study's numbers say of a claim, and what they leave open."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# of the intervals, and of the tests that power is of
CONFIDENCE = 0.95
_ESTIMATES = 4000

Answer = Literal["shows", "the other way", "no larger effect", "undecided", "too weak to compare"]


@dataclass(frozen=True)
class Verdict:
    """A claim, and whether it shows.

    Attributes:
        claim: a statement.
        answer: "shows"; "the other way", if the opposite does; "no larger effect", if the
            difference is too small to matter; "undecided"; "too weak to compare".
        because: the numbers, in words.
        expected: what the paper finds.
    """

    claim: str
    answer: Answer
    because: str
    expected: Answer = "shows"

    def __str__(self) -> str:
        beside = ""
        if self.answer not in ("undecided", "too weak to compare"):
            beside = ", as in the paper" if self.answer == self.expected else ", unlike the paper"
        return f"**{self.answer}{beside}**: {self.claim} ({self.because})"


@dataclass(frozen=True)
class Design:
    """What is decided before a study runs.

    Attributes:
        seeds: runs of each arm.
        smallest: the smallest effect of interest: a difference of less counts for nothing.
        spread: standard deviation, over seeds, of the paired difference of two arms, as a pilot
            run with other seeds gave it; None while there was no pilot.

    Examples:
        >>> from fastclip.study.verdict import Design
        >>> print(Design(seeds=4, smallest=0.03, spread=0.012))
        4 seeds find a difference of 3.0 points with a probability of 0.89, at the pilot's spread \
of 1.2 points.
    """

    seeds: int
    smallest: float
    spread: float | None = None

    @property
    def power(self) -> float | None:
        """The probability of finding a difference of the smallest size of interest, if known."""
        if self.spread is None:
            return None
        return power(self.smallest, self.spread, self.seeds)

    def __str__(self) -> str:
        if self.spread is None:
            return (
                f"differences of {100 * self.smallest:.1f} points or more are of interest. There "
                f"was no pilot: with what probability {self.seeds} seeds find one is not known."
            )
        return (
            f"{self.seeds} seeds find a difference of {100 * self.smallest:.1f} points with a "
            f"probability of {self.power:.2f}, at the pilot's spread of "
            f"{100 * self.spread:.1f} points."
        )


def power(effect: float, spread: float, seeds: int) -> float:
    """The probability that a paired t-test at 95 % finds an effect.

    Args:
        effect: the true mean difference.
        spread: standard deviation of the difference over seeds, above 0.
        seeds: pairs; with one there is no test, and the result is 0.
    """
    import numpy as np
    from scipy.stats import chi2, norm, t

    if seeds < 2:
        return 0.0
    degrees, shift = seeds - 1, abs(effect) / spread * math.sqrt(seeds)
    critical = t.ppf((1 + CONFIDENCE) / 2, degrees)
    # the mean over the estimates of the spread, as scipy's noncentral t is NaN for large effects
    shares = (np.arange(_ESTIMATES) + 0.5) / _ESTIMATES
    limits = critical * np.sqrt(chi2.ppf(shares, degrees) / degrees)
    return float(np.mean(norm.cdf(shift - limits) + norm.cdf(-shift - limits)))


def half_width(values: Sequence[float]) -> float:
    """Of the mean's 95 % interval by Student's t; infinite for one value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return math.inf
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return quantile * statistics.stdev(values) / math.sqrt(count)


def compare(
    claim: str,
    what: str,
    values: Sequence[float],
    smallest: float,
    expected: Answer = "shows",
) -> Verdict:
    """What a difference, by its values seed by seed, says of the claim that it is above 0.

    Its 95 % interval lies within ±smallest: no larger effect; else above 0: shows; else below 0:
    the other way; else undecided, as is always said of a single seed.

    Args:
        claim: what a positive difference would mean.
        what: the difference, named.
        values: one a seed, shares.
        smallest: the smallest effect of interest, a share.
        expected: what the paper finds.
    """
    mean, half = statistics.mean(values), half_width(values)
    answer: Answer = "undecided"
    if abs(mean) + half < smallest:
        answer = "no larger effect"
    elif mean - half > 0:
        answer = "shows"
    elif mean + half < 0:
        answer = "the other way"
    interest = f"smallest effect of interest: {100 * smallest:.1f}"
    return Verdict(claim, answer, f"{what} {_points(mean, half)}; {interest}", expected)


def is_strong(score: float, chance: float, best: float) -> bool:
    """Whether a score is at least half-way from chance to the best arm's."""
    return score >= (chance + best) / 2


def _points(mean: float, half: float) -> str:
    if math.isinf(half):
        return f"{100 * mean:+.1f} points with one seed"
    return f"{100 * mean:+.1f} ± {100 * half:.1f} points"
