"""What studies measure of a run: its lines of metrics, rows of features, recalls."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastclip.data.faults import FaultLog
from fastclip.evaluate.features import ImageFeatures
from fastclip.study import runs
from fastclip.study.runs import first_rows, losses_of, recalls, steady_speed, training_seconds
from fastclip.train.config import parse
from tests.evaluate.planned import planned_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty lines, of two steps each, between two validations."""
    lines = [{"step": 0, "val/loss": 9.0}]
    lines += [
        {"step": 2 * i + 2, "loss": 20.0 - i, "samples_per_second": 100.0 + i} for i in range(20)
    ]
    lines.append({"step": 40, "val/loss": 8.0})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def test_losses_and_times_of_a_run(run: Path) -> None:
    # means of two lines each; the median of 110 ... 119
    assert losses_of(run) == (19.5, 1.5)
    assert steady_speed(run) == 114.5
    seconds = sum(2 * 8 / (100 + i) for i in range(20))
    assert training_seconds(run, batch=8) == pytest.approx(seconds)


def planned(features: list[list[float]]) -> ImageFeatures:
    count = len(features)
    return ImageFeatures(
        torch.tensor(features),
        [(f"text {i}",) for i in range(count)],
        list(range(10, 10 + count)),
        [f"key {i}" for i in range(count)],
        FaultLog(),
    )


def test_rows_stay_together() -> None:
    images = planned([[float(i)] for i in range(6)])
    part = first_rows(images, 3, start=2)
    assert part.features.tolist() == [[2.0], [3.0], [4.0]]
    assert part.texts == [("text 2",), ("text 3",), ("text 4",)]
    assert part.labels == [12, 13, 14] and part.keys == ["key 2", "key 3", "key 4"]


def test_both_directions_of_retrieval() -> None:
    """Two of three images find their texts; one text of three finds its image."""
    images = planned([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    model = planned_model({"text 0": (1, 0, 0), "text 1": (9, 1, 0), "text 2": (9, 3, 3)})
    scores, chance = recalls(model, images, 1)
    assert scores == pytest.approx({"image_to_text": 2 / 3, "text_to_image": 1 / 3})
    assert chance == pytest.approx({"image_to_text": 1 / 3, "text_to_image": 1 / 3})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The flags of each training, which takes 60 s by the clock; with --fails it fails."""
    flags_of: list[tuple[str, ...]] = []
    clock = iter(range(0, 10_000, 60))

    def train(name: str, flags: tuple[str, ...], folder: Path, jobs: int) -> Path:
        flags_of.append(flags)
        if "--fails" in flags:
            raise runs.FailedRunError("killed")
        line = {"step": 1, "loss": 2.0, "samples_per_second": 1.0}
        (folder / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return folder / name

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    return flags_of


def no_scores(path: Path) -> runs.Scores:
    return {}, {}


def test_an_unfinished_run_is_not_taken_for_one_of_other_flags(
    trained: list[tuple[str, ...]], tmp_path: Path
) -> None:
    with pytest.raises(runs.FailedRunError):
        runs.run("a", ("--fails", "--lr", "1e-3"), tmp_path, no_scores)
    # it has no outcome yet; resumed without a flag it would take the old value
    with pytest.raises(FileExistsError, match="is of other flags; choose another --output"):
        runs.run("a", (), tmp_path, no_scores)
    assert trained == [("--fails", "--lr", "1e-3")]


def test_the_time_of_a_run_is_that_of_all_attempts(
    trained: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs.train

    def interrupted(*arguments: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runs.run("a", ("--wd", "0"), tmp_path, no_scores)
    monkeypatch.setattr(runs, "train", train)
    assert runs.run("a", ("--wd", "0"), tmp_path, no_scores).seconds == 180


@pytest.mark.parametrize(
    ("flags", "has_bf16", "precision"),
    [
        ((), True, "amp_bf16"),
        ((), False, "fp32"),
        (("--precision", "fp32"), True, "fp32"),
        (("--precision", "amp_bf16"), False, "amp_bf16"),
        # a recipe's own
        (("--config", "align_scenes"), True, "fp32"),
    ],
)
def test_the_precision_is_the_runs_own_or_the_usual_one_of_the_device(
    flags: tuple[str, ...],
    has_bf16: bool,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def started(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("fastclip.device.has_bf16_product", lambda _: has_bf16)
    monkeypatch.setattr(runs.subprocess, "run", started)
    runs.train("a", ("--train-data", "scenes", *flags), tmp_path)
    [command] = commands
    # what the trainer makes of it, recipe and default included
    assert parse(command[4:]).model.precision == precision
