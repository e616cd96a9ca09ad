"""Effective robustness against published figures, and its statistics against their definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.evaluate.effective_robustness import (
    BASELINES,
    OWN_CLASSES_BASELINES,
    Line,
    bootstrap_lines,
    clopper_pearson,
    effective_robustness,
    fit_line,
    line_band,
    suited_fit,
)
from fastclip.evaluate.robustness_plot import plot_robustness

# Per cent, from the public accuracies of the ImageNet testbed: the model, its accuracy on ImageNet;
# by shift its accuracy, what the "standard" line foretells, and the difference.
PUBLISHED = {
    "ResNet-50": (
        76.13,
        {
            "imagenetv2": (63.21, 63.95, -0.7),
            "imagenet-sketch": (24.09, 24.45, -0.4),
            "imagenet-r": (36.17, 36.76, -0.6),
            "objectnet": (35.75, 34.68, 1.1),
        },
    ),
    "CLIP ViT-B/32": (
        63.30,
        {
            "imagenetv2": (55.77, 50.14, 5.6),
            "imagenet-sketch": (42.37, 14.35, 28.0),
            "imagenet-r": (69.26, 24.92, 44.3),
            "objectnet": (43.96, 20.25, 23.7),
        },
    ),
}
# half of the last digit that is given
ROUNDING_OF_ACCURACY = 0.005
ROUNDING_OF_RHO = 0.05


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("shift", ["imagenetv2", "imagenet-sketch", "imagenet-r", "objectnet"])
def test_published_models(model: str, shift: str) -> None:
    accuracy, by_shift = PUBLISHED[model]
    shifted, foretold, rho = by_shift[shift]
    line = BASELINES["standard"][shift]
    # x is rounded too; a line of logits of slope 1.2 or less makes at most 1.5 times as much of it
    tolerance = 2.5 * ROUNDING_OF_ACCURACY
    assert 100 * line.predict(accuracy / 100) == pytest.approx(foretold, abs=tolerance)
    found = 100 * effective_robustness(shifted / 100, accuracy / 100, line)
    assert found == pytest.approx(rho, abs=tolerance + ROUNDING_OF_RHO)


@pytest.mark.parametrize(
    ("accuracies", "rhos"),
    [
        ((67.7, 55.3, 19.2, 31.1), (0.5, 2.6, 1.6)),
        ((32.4, 28.0, 7.3, 22.3), (4.5, 3.0, 9.2)),
        ((24.5, 22.8, 18.6, 38.0), (5.2, 15.6, 27.6)),
        ((38.1, 33.0, 27.3, 48.1), (5.1, 21.8, 32.9)),
    ],
    ids=["ImageNet only", "YFCC15M", "CC12M", "LAION15M+CC12M"],
)
def test_published_models_of_low_accuracy(accuracies: tuple, rhos: tuple) -> None:
    x, *shifted = (accuracy / 100 for accuracy in accuracies)
    names = ("imagenetv2", "imagenet-sketch", "imagenet-r")
    for name, y, rho in zip(names, shifted, rhos, strict=True):
        found = 100 * effective_robustness(y, x, BASELINES["low"][name])
        # accuracies and rho have one digit: 0.05 each, that of x times the slope of at most 1
        assert found == pytest.approx(rho, abs=0.15), name


# Slopes and intercepts in logits, fitted to the testbed's table of accuracies: of the shift's own
# classes, and of the mean over ImageNetV2, -Sketch, -R and ObjectNet.
TESTBED = {
    "imagenet-r": (0.6368, -2.1077),
    "objectnet": (0.9809, -1.9283),
    "imagenet-a": (1.9900, -7.6325),
    "average": (0.9454, -1.5042),
}


@pytest.mark.parametrize("shift", TESTBED)
def test_the_fits_to_the_testbed(shift: str) -> None:
    slope, intercept = TESTBED[shift]
    lines = {**OWN_CLASSES_BASELINES, "average": BASELINES["standard"]["average"]}
    assert lines.keys() == TESTBED.keys()
    for odds in (1.0, 4.0, 9.0):
        foretold = odds**slope * math.exp(intercept)
        found = lines[shift].predict(odds / (1 + odds))
        assert found == pytest.approx(foretold / (1 + foretold), rel=1e-9)


def test_which_fit_suits() -> None:
    assert suited_fit(0.55) == "standard" and suited_fit(0.5499) == "low"


def test_line_by_hand() -> None:
    # odds of 1, times e^1: e / (1 + e)
    assert Line(1.0, 1.0).predict(0.5) == pytest.approx(math.e / (1 + math.e), rel=1e-12)
    # odds of 4 squared: 16 / 17
    assert Line(2.0, 0.0).predict(0.8) == pytest.approx(16 / 17, rel=1e-12)
    # one and two standard deviations
    one, two = (0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (1, 2))
    assert Line(2.0, 0.0, "probit").predict(one) == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("transform", ["logit", "probit"])
def test_limits_of_a_line(transform: str) -> None:
    assert Line(0.9, -1, transform).predict(0.0) == 0 and Line(0.9, -1, transform).predict(1.0) == 1
    assert Line(-0.9, 1, transform).predict(0.0) == 1
    level = Line(0.0, 0.0, transform)
    assert level.predict(0.0) == level.predict(0.3) == level.predict(1.0) == 0.5
    with pytest.raises(ValueError, match=r"63\.3 is outside \[0, 1\]; give a fraction"):
        Line(0.9, -1, transform).predict(63.3)
    with pytest.raises(ValueError, match="outside"):
        Line(0.9, -1, transform).predict(math.nan)


def models(seed: int, count: int = 12) -> tuple[list[float], list[float]]:
    """Accuracies somewhere around a line."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.2, 0.8, count)
    odds = 0.4 * x / (1 - x) * np.exp(rng.normal(0, 0.2, count))
    return x.tolist(), (odds / (1 + odds)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_fit_is_least_squares_of_logits(seed: int) -> None:
    x, y = models(seed)
    logits_x, logits_y = ([math.log(p / (1 - p)) for p in values] for values in (x, y))
    slope, intercept = np.polyfit(logits_x, logits_y, 1)
    line = fit_line(x, y)
    # both solve the same system in double precision
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept), rel=1e-9)


@pytest.mark.parametrize("transform", ["logit", "probit"])
def test_fit_finds_the_line_that_made_the_accuracies(transform: str) -> None:
    made = Line(0.9, -0.7, transform)
    x = [0.1, 0.35, 0.5, 0.9]
    found = fit_line(x, [made.predict(accuracy) for accuracy in x], transform)
    assert (found.slope, found.intercept) == pytest.approx((0.9, -0.7), rel=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.1, 0.2, 1.0], [0.1, 0.2, 0.3], r"model c has the accuracies 1\.0 and 0\.3"),
        ([0.1, 0.2, 0.3], [0.0, 0.2, 0.3], r"model a has the accuracies 0\.1 and 0\.0"),
        ([0.1, 0.2, math.nan], [0.1, 0.2, 0.3], "model c"),
        ([0.2, 0.2, 0.2], [0.1, 0.2, 0.3], "1 different ones"),
        ([0.2, 0.3], [0.1], "2 and 1 accuracies"),
        ([], [], "two models or more"),
    ],
)
def test_what_has_no_line(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_line(x, y, names=["a", "b", "c"])


def test_bootstrap() -> None:
    x, y = models(0)
    lines = bootstrap_lines(x, y, fits=200)
    assert lines == bootstrap_lines(x, y, fits=200), "the draws are seeded"
    assert lines != bootstrap_lines(x, y, fits=200, seed=1)
    fit = fit_line(x, y)
    at = np.array([0.3, 0.5, 0.7])
    low, high = line_band(lines, at)
    assert (low < fit.predict(at)).all() and (fit.predict(at) < high).all()
    inside = [low[1] <= line.predict(0.5) <= high[1] for line in lines]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)


def test_models_of_one_run_are_drawn_together() -> None:
    """Two runs: what is drawn are both, or one of them twice; three different lines."""
    x, y = [0.2, 0.4, 0.5, 0.8], [0.1, 0.35, 0.3, 0.7]
    lines = bootstrap_lines(x, y, runs=(0, 0, 1, 1), fits=100)
    known = [fit_line(x, y), fit_line(x[:2], y[:2]), fit_line(x[2:], y[2:])]
    slopes = {round(line.slope, 9) for line in lines}
    assert slopes == {round(line.slope, 9) for line in known}


def test_bootstrap_redraws_what_has_no_line() -> None:
    # of two models half of all draws hold one of them twice
    lines = bootstrap_lines([0.2, 0.6], [0.1, 0.5], fits=50)
    fit = fit_line([0.2, 0.6], [0.1, 0.5])
    assert len(lines) == 50
    assert all(line.slope == pytest.approx(fit.slope) for line in lines)


def binomial_tail(count: int, least: int, p: float) -> float:
    """Probability of `least` or more successes."""
    return sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(least, count + 1))


def bisect(function, target: float) -> float:
    """Where a rising function of [0, 1] reaches the target."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return low


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (0, 10), (3, 10), (10, 10), (37, 50)])
@pytest.mark.parametrize("alpha", [0.005, 0.05])
def test_clopper_pearson_inverts_binomial_tails(correct: int, count: int, alpha: float) -> None:
    low, high = clopper_pearson(correct, count, alpha)
    # so many or more successes have a probability of alpha / 2 at the lower end, so many or fewer
    # at the upper
    below = bisect(lambda p: binomial_tail(count, correct, p), alpha / 2) if correct else 0.0
    above = bisect(lambda p: binomial_tail(count, correct + 1, p), 1 - alpha / 2)
    assert (low, high) == pytest.approx((below, above if correct < count else 1.0), abs=1e-9)
    assert low <= correct / count <= high


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_counts_that_make_no_accuracy(correct: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} right of {count}"):
        clopper_pearson(correct, count)


@pytest.mark.parametrize("transform", ["logit", "probit"])
def test_plot(transform: str, tmp_path: Path) -> None:
    x, y = models(0)
    line = fit_line(x, y, transform)
    band = bootstrap_lines(x, y, transform, fits=20)
    points = [
        ("all right", 1.0, 0.0, (0.9, 1.0), (0.0, 0.1)),
        ("CLIP", 0.6, 0.5, (0.55, 0.65), (0.45, 0.55)),
    ]
    path = tmp_path / "plots" / "robustness.png"
    plot_robustness(path, list(zip(x, y, strict=True)), points, line, band, "ImageNet", "V2")
    with Image.open(path) as image:
        drawn = np.asarray(image.convert("RGB"))
    # the first two models have the first two colors of matplotlib's cycle
    for color in ((31, 119, 180), (255, 127, 14)):
        assert (drawn == color).all(axis=2).sum() > 20
    plot_robustness(tmp_path / "plain.png", [], points, None, [], "x", "y")
    with pytest.raises(ValueError, match="no model to draw"):
        plot_robustness(tmp_path / "empty.png", [], [], line, band, "x", "y")
