"""Which epochs' checkpoints are kept, which is the best, and how it is loaded."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint
from fastclip.models.open import is_run
from fastclip.train import validate
from fastclip.train.config import parse
from fastclip.train.loop import train

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Let the next evaluations return these values of a metric instead of what is measured."""

    def set_scores(*values: float, name: str = "val/loss") -> None:
        scores = iter(values)
        monkeypatch.setattr(validate.Validator, "__call__", lambda _: {name: next(scores)})

    return set_scores


def kept(run: Path) -> set[int]:
    """The epochs whose checkpoints are there, each with its manifest and nothing else."""
    paths = set((run / "checkpoints").iterdir())
    epochs = {int(path.stem.removeprefix("epoch_")) for path in paths}
    assert len(paths) == 2 * len(epochs)
    return epochs


def best_of(run: Path) -> Any:
    file = run / "best.json"
    return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture
def flags(train_flags: list[str]) -> list[str]:
    return [*train_flags, "--train-num-samples", "16", "--name", "a", "--val-data", "scenes"]


def test_the_newest_and_the_best_are_kept_and_the_best_is_loaded(
    flags: list[str], script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(3.0, 2.0, math.nan, 2.5)
    assert main(["train", *flags, "--epochs", "4"]) == 0
    said, run = capsys.readouterr().err, tmp_path / "logs" / "a"
    assert kept(run) == {2, 4}
    assert best_of(run) == {"checkpoint": "epoch_2.pt", "metric": "val/loss", "value": 2.0}
    assert "saves     the newest epoch and the best by val/loss (--save-all: every epoch)" in said
    assert f"epoch_2.pt by val/loss: --model {run}@best" in said.replace("\n          ", " ")

    best = fastclip.load(f"{run}@best").model.state_dict()
    saved = checkpoint.read(run / "checkpoints" / "epoch_2.pt")["state_dict"]
    assert all(torch.equal(best[name], saved[name]) for name in saved)
    newest = fastclip.load(run).model.state_dict()
    assert not all(torch.equal(best[name], newest[name]) for name in saved)

    # wherever a run or a checkpoint is named
    assert is_run("a@best") and not is_run("a@best", "laion2b")
    data = ["--data", "scenes", "--model", f"{run}@best"]
    assert main(["eval", "retrieval", *data]) == 0
    assert [path.name for path in (run / "eval").iterdir()] == ["retrieval_scenes_best.json"]
    assert main(["convert", "to-open-clip", f"{run}@best", str(tmp_path / "model.pt")]) == 0
    assert torch.equal(
        torch.load(tmp_path / "model.pt")["state_dict"]["logit_scale"], saved["logit_scale"]
    )
    onward = ["--name", "b", "--epochs", "3", "--pretrained", f"{run}@best", "--lr", "0"]
    script(1.0, 1.0, 1.0)
    second = train(parse([*flags, *onward, "--wd", "0"]))
    assert torch.equal(fastclip.load(second).model.logit_scale, saved["logit_scale"])
    # of equals the first
    assert kept(second) == {1, 3}


def test_a_resumed_run_knows_what_was_best(flags: list[str], script: Script) -> None:
    script(2.0, 3.0)
    run = train(parse(flags))
    script(2.5, 1.0)
    train(parse([*flags, "--epochs", "3", "--resume", "latest"]))
    assert kept(run) == {1, 3} and best_of(run)["checkpoint"] == "epoch_1.pt"
    train(parse([*flags, "--epochs", "4", "--resume", "latest"]))
    assert kept(run) == {4} and best_of(run)["value"] == 1.0


@pytest.mark.parametrize(
    ("asked", "left", "best"),
    [
        ("--save-all", {1, 2, 3}, 1),
        ("--delete-previous-checkpoint", {3}, None),
        # of all but losses the highest
        ("--best-metric val/acc1", {2, 3}, 2),
        ("--val-frequency 2", {2, 3}, 2),
    ],
)
def test_other_rules(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, asked: str, left: set[int], best: int | None
) -> None:
    lines = iter([(1.0, 0.1), (2.0, 0.3), (3.0, 0.2)])
    monkeypatch.setattr(
        validate.Validator,
        "__call__",
        lambda _: dict(zip(("val/loss", "val/acc1"), next(lines), strict=True)),
    )
    if "frequency" in asked:
        next(lines)
    run = train(parse([*flags, "--epochs", "3", *asked.split()]))
    assert kept(run) == left
    found = best_of(run)
    assert (found and found["checkpoint"]) == (best and f"epoch_{best}.pt")


def test_without_validation_the_newest_is_kept(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(parse([*train_flags, "--name", "a"]))
    assert kept(run) == {2} and best_of(run) is None
    assert main(["eval", "retrieval", "--model", f"{run}@best", "--data", "scenes"]) == 1
    says = capsys.readouterr().err
    assert f"no checkpoint of {run} is known to be the best" in says and "--val-data" in says


def test_a_resume_without_save_all_deletes_what_it_replaces_alone(
    flags: list[str], script: Script
) -> None:
    script(4.0, 2.0, 3.0, 3.0, 1.0)
    run = train(parse([*flags, "--epochs", "4", "--save-all"]))
    train(parse([*flags, "--no-save-all", "--epochs", "5", "--resume", "latest"]))
    assert kept(run) == {1, 3, 5}


def test_a_full_disk_deletes_nothing(
    flags: list[str],
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_best", full)
    script(2.0, 1.0)
    assert main(["train", *flags]) == 0
    assert kept(tmp_path / "logs" / "a") == {1, 2}
    assert "best.json could not be written: [Errno 28]" in capsys.readouterr().err


def test_a_foreign_run_does_not_lead_out_of_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("../../other.pt", 3, None):
        (run / "best.json").write_text(json.dumps({"checkpoint": name}))
        with pytest.raises(ValueError, match=r"best\.json names no checkpoint"):
            checkpoint.resolve(Path(f"{run}@best"))
    # a folder that is called so is a folder
    (tmp_path / "run@best").mkdir()
    assert checkpoint.run_of(tmp_path / "run@best") == tmp_path / "run@best"


@pytest.mark.parametrize("other", ["--save-all", "--best-metric val/acc1"])
def test_the_newest_alone_and_more_exclude_each_other(train_flags: list[str], other: str) -> None:
    with pytest.raises(ValueError, match=f"keeps the newest alone, against {other}"):
        parse([*train_flags, "--delete-previous-checkpoint", *other.split()])
