"""Effective robustness: accuracy under a shift beyond what in-distribution accuracy foretells.

Accuracies on a shifted distribution follow a line of the in-distribution ones, in logit space
(Taori et al. 2020, "Measuring Robustness to Natural Distribution Shifts in Image Classification",
section 2). All accuracies are in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from scipy import special, stats

Transform = Literal["logit", "probit"]

# Each with its inverse.
TRANSFORMS: dict[Transform, tuple[Any, Any]] = {
    "logit": (special.logit, special.expit),
    "probit": (special.ndtri, special.ndtr),
}

BOOTSTRAP_FITS = 1000
BOOTSTRAP_SEED = 720257663
# below this accuracy, the line of ImageNet's models, all above it, is not reliable
STANDARD_FROM = 0.55

_Accuracy = TypeVar("_Accuracy", float, np.ndarray)


@dataclass(frozen=True)
class Line:
    """A line between accuracies that a transform has spread over all numbers.

    Args:
        slope, intercept: of transform(y) = slope * transform(x) + intercept.
        transform: "logit", ln(p / (1 - p)), or "probit", the normal distribution's quantile.
    """

    slope: float
    intercept: float
    transform: Transform = "logit"

    def predict(self, accuracy: _Accuracy) -> _Accuracy:
        """The accuracy under the shift that an in-distribution one foretells; at 0 and 1 the limit.

        Raises:
            ValueError: an accuracy is outside [0, 1].
        """
        if not np.all((np.asarray(accuracy) >= 0) & (np.asarray(accuracy) <= 1)):
            raise ValueError(
                f"accuracy {accuracy} is outside [0, 1]; give a fraction, not a percentage"
            )
        forward, backward = TRANSFORMS[self.transform]
        # a level line has its intercept at the infinite ends too
        rise = self.slope * forward(accuracy) if self.slope else 0 * np.asarray(accuracy)
        return backward(rise + self.intercept)


# Fits to the public accuracies of the ImageNet testbed (Taori et al. 2020) on ImageNet's validation
# images: "standard" of the models with 55 % or more, "low" with its CNNs from 0.3 % on added.
BASELINES: dict[str, dict[str, Line]] = {
    "standard": {
        "imagenetv2": Line(0.9232, -0.4977),
        "imagenet-sketch": Line(1.0709, -2.3701),
        "imagenet-r": Line(0.9116, -1.5999),
        "objectnet": Line(1.1993, -2.0243),
        "average": Line(0.9454, -1.5042),
    },
    "low": {
        "imagenetv2": Line(0.9326, -0.4968),
        "imagenet-sketch": Line(1.0077, -2.3591),
        "imagenet-r": Line(0.6900, -1.3812),
        "objectnet": Line(0.7792, -1.6785),
    },
}
# The "standard" fits on those validation images alone that are of the shift's own classes.
OWN_CLASSES_BASELINES: dict[str, Line] = {
    "imagenet-r": Line(0.6368, -2.1077),
    "objectnet": Line(0.9809, -1.9283),
    "imagenet-a": Line(1.9900, -7.6325),
}


def suited_fit(accuracy: float) -> str:
    """Which of `BASELINES` is meant for a model of this accuracy on ImageNet."""
    return "standard" if accuracy >= STANDARD_FROM else "low"


def effective_robustness(shift_accuracy: float, accuracy: float, line: Line) -> float:
    """ρ: the accuracy under the shift less what the line foretells from the one without.

    Args:
        shift_accuracy, accuracy: of one model, on the shifted and the original distribution.
        line: fitted on models that were trained on the original distribution alone.
    """
    return shift_accuracy - line.predict(accuracy)


def fit_line(
    x: Sequence[float],
    y: Sequence[float],
    transform: Transform = "logit",
    *,
    names: Sequence[str] = (),
) -> Line:
    """The line through models' accuracies by ordinary least squares.

    Args:
        x, y: in-distribution and shifted accuracies, one a model, above 0 and below 1.
        names: of the models, for messages.

    Raises:
        ValueError: fewer than two models, none that differ in x, or an accuracy that has no finite
            transform.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(
            f"{len(x)} and {len(y)} accuracies, {len(set(x))} different ones in-distribution: "
            "a line needs both of each model, and two models or more that differ"
        )
    for i, pair in enumerate(zip(x, y, strict=True)):
        if not all(0 < accuracy < 1 for accuracy in pair):
            name = names[i] if names else f"number {i}"
            raise ValueError(
                f"model {name} has the accuracies {pair[0]} and {pair[1]}, of which one has no "
                f"finite {transform}; leave the model out, or measure it on more images"
            )
    forward, _ = TRANSFORMS[transform]
    slope, intercept, *_ = stats.linregress(forward(np.asarray(x)), forward(np.asarray(y)))
    return Line(float(slope), float(intercept), transform)


def bootstrap_lines(
    x: Sequence[float],
    y: Sequence[float],
    transform: Transform = "logit",
    *,
    runs: Sequence[int] | None = None,
    fits: int = BOOTSTRAP_FITS,
    seed: int = BOOTSTRAP_SEED,
) -> list[Line]:
    """Lines fitted to models drawn with replacement, whose spread is the line's uncertainty.

    Draws that hold one x only have no line and are drawn anew.

    Args:
        x, y, transform: as for `fit_line`.
        runs: of each model the number of the run that it is of: a run's models are not
            independent, and are drawn together. None: each is of its own.

    Raises:
        ValueError: as `fit_line`.
    """
    fit_line(x, y, transform)
    models, run_of = np.column_stack([x, y]), np.array(range(len(x)) if runs is None else runs)
    parts = [models[run_of == run] for run in np.unique(run_of)]
    rng = np.random.default_rng(seed)
    lines: list[Line] = []
    while len(lines) < fits:
        chosen = np.concatenate([parts[i] for i in rng.integers(len(parts), size=len(parts))])
        if np.ptp(chosen[:, 0]) > 0:
            lines.append(fit_line(chosen[:, 0].tolist(), chosen[:, 1].tolist(), transform))
    return lines


def line_band(
    lines: Sequence[Line], at: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Between which accuracies the middle share `level` of the lines lies at each of `at`, (N,)."""
    curves = np.stack([line.predict(at) for line in lines])
    low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def clopper_pearson(correct: int, count: int, alpha: float = 0.005) -> tuple[float, float]:
    """The exact confidence interval of an accuracy (Clopper and Pearson 1934).

    Args:
        correct: right answers among `count`.
        alpha: probability that the interval misses; the testbed's 0.005 by default.

    Raises:
        ValueError: there are no images, or more right answers than images.
    """
    if not 0 <= correct <= count or count < 1:
        raise ValueError(f"{correct} right of {count}: give a count above 0 and 0..count right")
    wrong = count - correct
    low = stats.beta.ppf(alpha / 2, correct, wrong + 1) if correct else 0.0
    high = stats.beta.ppf(1 - alpha / 2, correct + 1, wrong) if wrong else 1.0
    return float(low), float(high)
