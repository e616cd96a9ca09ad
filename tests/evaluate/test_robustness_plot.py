"""What the picture of effective robustness shows: which accuracy is on which axis."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from fastclip.evaluate import robustness_plot
from fastclip.evaluate.effective_robustness import Line, clopper_pearson
from fastclip.evaluate.robustness_plot import plot_robustness, plot_shifts
from fastclip.evaluate.shifts import evaluate_shifts


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of each figure, before it is closed."""
    found: list[Any] = []
    monkeypatch.setattr(pyplot, "close", lambda figure: found.append(figure.axes[0]))
    return found


def test_accuracy_is_across_and_that_under_shift_is_up(drawn: list[Any], tmp_path: Path) -> None:
    baselines, line = [(0.3, 0.2), (0.6, 0.35)], Line(0.9, -0.5)
    points = [("CLIP", 0.5, 0.4, (0.45, 0.56), (0.33, 0.47))]
    band = [line, Line(0.9, -0.6)]
    plot_robustness(tmp_path / "a.png", baselines, points, line, band, "ImageNet", "fog")
    (axes,) = drawn
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "accuracy (%), ImageNet",
        "accuracy (%), fog",
    )
    by_label = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    assert by_label["baseline models"].get_offsets().tolist() == [list(pair) for pair in baselines]
    across, up = by_label["baseline"].get_data()
    np.testing.assert_allclose(up, line.predict(across))
    # the dotted line
    assert np.array_equal(*by_label["no loss (y = x)"].get_data())
    marker, _, bars = by_label["CLIP"].lines
    assert marker.get_xydata().tolist() == [[0.5, 0.4]]
    level, upright = (bar.get_segments()[0].tolist() for bar in bars)
    np.testing.assert_allclose(level, [[0.45, 0.4], [0.56, 0.4]])
    np.testing.assert_allclose(upright, [[0.5, 0.33], [0.5, 0.47]])


def test_each_shift_is_drawn_with_its_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(robustness_plot, "plot_robustness", lambda *given: asked.append(given))
    monkeypatch.setattr(robustness_plot, "bootstrap_lines", lambda *given: [*given])
    ours = evaluate_shifts((80, 100), {"fog": (50, 100), "snow": (20, 50)})
    others = [
        evaluate_shifts((x, 100), {"fog": (y, 100)}) for x, y in ((30, 20), (50, 35), (90, 60))
    ]
    lines = {"fog": Line(0.9, -0.5)}
    # the last has no snow
    files = plot_shifts(tmp_path / "a.png", [("us", ours), ("it", others[2])], lines, others)
    assert files == [tmp_path / "a_fog.png", tmp_path / "a_snow.png"]
    fog, snow = asked
    x, y = [0.3, 0.5, 0.9], [0.2, 0.35, 0.6]
    interval = clopper_pearson
    us = ("us", 0.8, 0.5, interval(80, 100), interval(50, 100))
    it = ("it", 0.9, 0.6, interval(90, 100), interval(60, 100))
    fitted = list(zip(x, y, strict=True))
    band = [x, y]
    assert fog == (files[0], fitted, [us, it], lines["fog"], band, "in-distribution", "fog")
    us = ("us", 0.8, 0.4, interval(80, 100), interval(20, 50))
    assert snow == (files[1], [], [us], None, [], "in-distribution", "snow")
    # of one shift the name is as it was given
    assert plot_shifts(tmp_path / "b.png", [("it", others[0])], {}) == [tmp_path / "b.png"]
