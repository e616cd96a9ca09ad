"""Between two epochs: the loader, checkpoints, evaluations that fail or are stopped."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastclip.cli import main
from fastclip.data.loader import TrainingLoader
from fastclip.models import checkpoint
from fastclip.train import engine
from fastclip.train.config import parse
from fastclip.train.held_out import HeldOut
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.stop import StopSignals
from tests.processes import start_ranks
from tests.train.test_loop import identical, state_of


class Killed(BaseException):
    """As a kill would end the run: nothing catches it."""


@pytest.fixture
def flags(train_flags: list[str]) -> list[str]:
    """Three epochs of two steps, of which the last alone is saved."""
    flags = [*train_flags, "--train-num-samples", "16", "--epochs", "3", "--save-frequency", "9"]
    return [*flags, "--name", "a"]


@pytest.fixture
def evaluated(flags: list[str]) -> list[str]:
    return [*flags, "--val-data", "scenes", "--val-num-samples", "8"]


def saved_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*.pt"))


def scored_steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run) if "val/loss" in line]


def test_a_step_checkpoint_is_due_at_an_epochs_end_that_is_not_saved(flags: list[str]) -> None:
    flags = [*flags, "--save-every-steps", "2"]
    whole = train(parse(flags))
    assert saved_in(whole) == ["epoch_3.pt", "step_00000002.pt", "step_00000004.pt"]
    source = str(whole / "checkpoints" / "step_00000002.pt")
    resumed = train(parse([*flags, "--name", "b", "--resume", source]))
    for key in ("state_dict", "optimizer", "rng", "data", "step"):
        assert identical(state_of(resumed, "epoch_3.pt")[key], state_of(whole, "epoch_3.pt")[key])
    # each epoch saved has one checkpoint, not two
    both = train(parse([*flags, "--name", "c", "--save-frequency", "1", "--save-all"]))
    assert saved_in(both) == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]


def test_a_kill_in_an_evaluation_leaves_it_to_the_resumed_run(
    evaluated: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The step's checkpoint is that of the epoch's end."""
    flags = [*evaluated, "--save-every-steps", "2"]

    def kill(self: HeldOut) -> dict[str, float]:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(HeldOut, "__call__", kill)
        train(parse(flags))
    assert saved_in(tmp_path / "logs" / "a") == ["step_00000002.pt"]
    assert scored_steps(train(parse([*flags, "--resume", "latest"]))) == [2, 4, 6]


def test_an_epochs_batches_are_taken_to_their_end(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that is left before it keeps nothing for the next epoch."""
    batches = TrainingLoader.batches
    ended = []

    def watched(self: TrainingLoader, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        yield from batches(self, epoch, first_step)
        ended.append(epoch)

    monkeypatch.setattr(TrainingLoader, "batches", watched)
    train(parse(flags))
    assert ended == [0, 1, 2]


def test_a_run_builds_one_pipeline(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install '.[dali]'")
    from fastclip.data.dali import DaliLoader

    build = DaliLoader._built
    built = []

    def counted(self: DaliLoader) -> Any:
        built.append(self)
        return build(self)

    monkeypatch.setattr(DaliLoader, "_built", counted)
    train(parse([*flags, "--data-backend", "dali"]))
    assert len(built) == 1


def failing(self: HeldOut) -> dict[str, float]:
    raise ValueError("labels out of range")


@pytest.mark.parametrize("why", ["it fails", "its metric is not there"])
def test_a_failing_evaluation_saves_the_epoch(
    evaluated: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    why: str,
) -> None:
    """Also one that is not to be saved otherwise."""
    wrong = ["--best-metric", "val/lossx"] if "metric" in why else []
    with monkeypatch.context() as patch:
        if not wrong:
            patch.setattr(HeldOut, "__call__", failing)
        assert main(["train", *evaluated, *wrong]) == 1
    said = capsys.readouterr().err
    assert ("resume the run, whose epoch is saved" if wrong else "labels out of range") in said
    run = tmp_path / "logs" / "a"
    assert saved_in(run) == ["epoch_1.pt"] and state_of(run, "epoch_1.pt")["step"] == 2
    # nothing is lost of what an undisturbed run has
    right = ["--best-metric", "val/loss"] if wrong else []
    assert scored_steps(train(parse([*evaluated, *right, "--resume", "latest"]))) == [2, 4, 6]


def train_failing(arguments: list[str]) -> int:
    HeldOut.__call__ = failing  # type: ignore[method-assign]
    return main(["train", *arguments])


@pytest.mark.slow
@pytest.mark.dist
def test_all_ranks_hear_of_a_failing_evaluation(evaluated: list[str], tmp_path: Path) -> None:
    """And save together, where a checkpoint is of all of them."""
    ranks = start_ranks(2, train_failing, [*evaluated, "--fsdp"])
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 4], errors
    assert "error: labels out of range" in errors[0]
    assert "rank 0 failed: ValueError: labels out of range" in errors[1]
    latest = checkpoint.find_latest(tmp_path / "logs" / "a" / "checkpoints")
    assert latest is not None and latest.name == "epoch_1"


def test_a_signal_while_an_epoch_is_saved_keeps_its_evaluation_from_beginning(
    evaluated: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = [*evaluated, "--save-frequency", "1"]
    write, measure = engine.checkpoint.write, HeldOut.__call__
    begun = []

    def signaled(path: Path, content: dict[str, Any]) -> None:
        write(path, content)
        if path.name == "epoch_1.pt":
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(self: HeldOut) -> dict[str, float]:
        begun.append(1)
        return measure(self)

    monkeypatch.setattr(HeldOut, "__call__", noted)
    with monkeypatch.context() as patch:
        patch.setattr(engine.checkpoint, "write", signaled)
        assert main(["train", *flags]) == 75
    assert not begun and read_metrics(tmp_path / "logs" / "a")[-1]["step"] == 2
    assert scored_steps(train(parse([*flags, "--resume", "latest"]))) == [2, 4, 6]


def test_a_signal_as_soon_as_it_may_end_something() -> None:
    """Ends that, and goes no further."""

    class Hasty(StopSignals):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_at_once" and value:
                os.kill(os.getpid(), signal.SIGTERM)

    done = []
    with Hasty() as stop:
        assert stop.at_once(lambda: done.append(1)) is None
    assert stop.received == signal.SIGTERM and not done


@pytest.mark.parametrize("left", ["epoch_7", ".ipynb_checkpoints"])
def test_a_folder_without_a_manifest_is_no_checkpoint(
    flags: list[str], left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a removal leaves one that was killed, or a notebook."""
    assert main(["train", *flags]) == 0
    run = Path(capsys.readouterr().out.strip())
    (run / "checkpoints" / left).mkdir()
    assert main(["train", *flags, "--resume", "latest", "--epochs", "4"]) == 0
    assert "epoch_4.pt" in capsys.readouterr().err
