"""What a run says of its loss: in its first lines, and on its plot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.train.config import parse
from fastclip.train.log import METRICS_FILE, plot_loss
from fastclip.train.loop import train


@pytest.mark.parametrize("objective", ["clip", "classify"])
def test_who_computes_the_loss(
    train_flags: list[str], objective: str, logged: Callable[[], str]
) -> None:
    """A classifier's cross-entropy is computed by none of the implementations."""
    flags = [*train_flags, "--train-num-samples", "8", "--epochs", "1", "--name", "a"]
    train(parse([*flags, "--objective", objective]))
    said = logged().partition("\nloss      ")[2]
    assert said.startswith("clip, computed by " if objective == "clip" else "classify\n")


def test_a_plots_axis_names_no_loss_in_particular(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from matplotlib import pyplot as plt

    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert plot_loss(tmp_path) is not None
    monkeypatch.undo()
    assert figures[0].axes[0].get_ylabel() == "loss"
    plt.close(figures[0])
