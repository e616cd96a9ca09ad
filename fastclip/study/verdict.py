"""What a study's numbers say of a claim, and what they leave open."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# of the intervals
CONFIDENCE = 0.95

Answer = Literal["shows", "does not show", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """A claim, and whether it shows.

    Attributes:
        claim: a statement.
        answer: shows, does not show (the opposite does), or unclear.
        because: the numbers, in words.
    """

    claim: str
    answer: Answer
    because: str

    def __str__(self) -> str:
        return f"**{self.answer}**: {self.claim} ({self.because})"


def half_width(values: Sequence[float]) -> float:
    """Of the mean's 95 % interval by Student's t; infinite for one value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return math.inf
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return quantile * statistics.stdev(values) / math.sqrt(count)


def positive(claim: str, what: str, values: Sequence[float], margin: float = 0.0) -> Verdict:
    """Whether a difference is above a margin, by its values seed by seed.

    Its 95 % interval lies above the margin: shows; below: does not show; around it: unclear, as is
    always said of a single seed.

    Args:
        claim: what it would mean.
        what: the difference, named.
        values: one a seed, shares.
        margin: share that counts for nothing.
    """
    mean, half = statistics.mean(values), half_width(values)
    answer: Answer = "unclear"
    if mean - half > margin:
        answer = "shows"
    elif mean + half < margin:
        answer = "does not show"
    beyond = f", to exceed {100 * margin:.1f}" if margin else ""
    return Verdict(claim, answer, f"{what} {_points(mean, half)}{beyond}")


def negligible(claim: str, what: str, values: Sequence[float], margin: float) -> Verdict:
    """Whether a difference is between -margin and margin; arguments as of `positive`.

    Its interval lies within: shows; outside altogether: does not show; else unclear.
    """
    mean, half = statistics.mean(values), half_width(values)
    answer: Answer = "unclear"
    if abs(mean) + half < margin:
        answer = "shows"
    elif abs(mean) - half > margin:
        answer = "does not show"
    within = f", to stay within {100 * margin:.1f}"
    return Verdict(claim, answer, f"{what} {_points(mean, half)}{within}")


def _points(mean: float, half: float) -> str:
    spread = f" ± {100 * half:.1f}" if math.isfinite(half) else ", one seed"
    return f"{100 * mean:+.1f}{spread} points"


def together(claim: str, parts: Sequence[Verdict]) -> Verdict:
    """A claim that takes all of its parts: unclear if a part is, and none fails."""
    answers = [part.answer for part in parts]
    answer: Answer = "shows"
    if "does not show" in answers:
        answer = "does not show"
    elif "unclear" in answers:
        answer = "unclear"
    return Verdict(claim, answer, f"of its {len(parts)} parts: {', '.join(answers)}")
