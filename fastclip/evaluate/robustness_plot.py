"""The picture of effective robustness: models' accuracies without and with a shift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.atomic import writing
from fastclip.evaluate.effective_robustness import (
    TRANSFORMS,
    Line,
    bootstrap_lines,
    line_band,
)
from fastclip.evaluate.shifts import shifts_in

Interval = tuple[float, float]
# A model's label, its accuracies without and with the shift, and the intervals of both.
Point = tuple[str, float, float, Interval, Interval]

# Accuracies that get a mark; they are as far apart as logits make them.
_TICKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
# zero and one are infinitely far away
_NEAREST = 5e-4
# of the axes' length, in what the transform makes of accuracies
_MARGIN = 0.08
_CURVE_POINTS = 200
_MOST_TICKS = 18


def plot_shifts(
    path: Path,
    models: Sequence[tuple[str, Mapping[str, Any]]],
    lines: Mapping[str, Line],
    baselines: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Draw each shift that the first model was measured on; returns the files.

    Args:
        path: the .png file; where there are several shifts, NAME_SHIFT.png beside it for each.
        models: labels and metrics, as `fastclip.evaluate.shifts` gives them.
        lines: the baseline of each shift that has one.
        baselines: metrics of the models that the lines were fitted on.
    """
    names = shifts_in(models[0][1])
    paths = [path.with_stem(f"{path.stem}_{name}") if len(names) > 1 else path for name in names]
    for name, file in zip(names, paths, strict=True):
        fitted = [(found["acc1"], found[name]["acc1"]) for found in baselines if name in found]
        x, y = [x for x, _ in fitted], [y for _, y in fitted]
        band = bootstrap_lines(x, y) if fitted else []
        points = [_point(label, found, found[name]) for label, found in models if name in found]
        plot_robustness(file, fitted, points, lines.get(name), band, "in-distribution", name)
    return paths


def plot_robustness(
    path: Path,
    baseline_points: Sequence[tuple[float, float]],
    points: Sequence[Point],
    line: Line | None,
    band: Sequence[Line],
    xlabel: str,
    ylabel: str,
) -> None:
    """Write a scatter on axes scaled by the line's transform, on which the line is straight.

    Accuracies of 0 and 1 are drawn at the nearest finite place.

    Args:
        path: the .png file; its folder is made if needed.
        baseline_points: accuracies (x, y) of the models that the line was fitted on.
        points: the models to look at.
        line: the baseline; None for the diagonal alone.
        band: bootstrap lines (`bootstrap_lines`), of which the middle 95 % are shaded; or none.
        xlabel, ylabel: the data that the accuracies are of.

    Raises:
        ValueError: there is no point at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [*baseline_points, *((x, y) for _, x, y, _, _ in points)]
    if not shown:
        raise ValueError(f"{path}: there is no model to draw")
    functions = TRANSFORMS[line.transform if line else "logit"]
    ends = [end for *_, x_ci, y_ci in points for end in (*x_ci, *y_ci)]
    low, high = _limits(np.array([*np.ravel(shown), *ends]), functions)
    figure, axes = plt.subplots(figsize=(6, 5.5))
    curve = functions[1](np.linspace(functions[0](low), functions[0](high), _CURVE_POINTS))
    axes.plot(curve, curve, color="0.7", linestyle=":", label="no loss (y = x)")
    if band:
        axes.fill_between(curve, *line_band(band, curve), color="0.88", label="95 % of fits")
    if line:
        axes.plot(curve, line.predict(curve), color="0.35", label="baseline")
    if baseline_points:
        x, y = _clipped(baseline_points).T
        axes.scatter(x, y, s=18, color="0.35", label="baseline models")
    for label, x, y, x_ci, y_ci in points:
        x, y = _clipped((x, y))
        arms = _arms(x, x_ci), _arms(y, y_ci)
        axes.errorbar(x, y, xerr=arms[0], yerr=arms[1], fmt="o", capsize=2, label=label)
    ticks = _ticks(low, high, functions[0])
    for axis in ("x", "y"):
        getattr(axes, f"set_{axis}scale")("function", functions=functions)
        getattr(axes, f"set_{axis}lim")(low, high)
        getattr(axes, f"set_{axis}ticks")(ticks, [f"{100 * tick:g}" for tick in ticks])
    axes.set(xlabel=f"accuracy (%), {xlabel}", ylabel=f"accuracy (%), {ylabel}")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        figure.savefig(file, dpi=130, format=path.suffix[1:] or "png")
    plt.close(figure)


def _point(label: str, original: Mapping[str, Any], shifted: Mapping[str, Any]) -> Point:
    x_ci, y_ci = ((found["ci_low"], found["ci_high"]) for found in (original, shifted))
    return label, original["acc1"], shifted["acc1"], x_ci, y_ci


def _clipped(accuracies: Any) -> np.ndarray:
    return np.clip(np.asarray(accuracies, dtype=np.float64), _NEAREST, 1 - _NEAREST)


def _limits(accuracies: np.ndarray, functions: tuple[Any, Any]) -> tuple[float, float]:
    """The axes' ends around the accuracies."""
    forward, backward = functions
    places = forward(_clipped(accuracies))
    margin = _MARGIN * max(float(np.ptp(places)), 1.0)
    return float(backward(places.min() - margin)), float(backward(places.max() + margin))


def _ticks(low: float, high: float, forward: Any) -> list[float]:
    """Those of `_TICKS` between the axes' ends whose labels have room."""
    room = (forward(high) - forward(low)) / _MOST_TICKS
    ticks: list[float] = []
    for tick in _TICKS:
        if low <= tick <= high and (not ticks or forward(tick) - forward(ticks[-1]) >= room):
            ticks.append(tick)
    return ticks


def _arms(accuracy: float, interval: Interval) -> np.ndarray:
    """The error bar's lengths below and above, (2, 1)."""
    low, high = _clipped(interval)
    return np.array([[accuracy - low], [high - accuracy]])
