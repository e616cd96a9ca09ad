"""A run that resumes has its own settings where the command line leaves them out."""

import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.cli import main
from fastclip.flags import flatten, inherited
from fastclip.models import checkpoint
from fastclip.train.config import TrainConfig, parse
from fastclip.train.distributed import World
from fastclip.train.inherited import SETTINGS_FILE
from fastclip.train.loop import train
from fastclip.train.report import Report
from fastclip.train.resume import _require_same
from tests.conftest import jpeg
from tests.train.test_loop import identical, state_of

# what is never taken from a run: where it is, who may read it, and which process this is
OF_COMMAND = {"resume", "name", "logs", "trust_checkpoint", "local_rank"}


@pytest.fixture
def flags(train_flags: list[str], tmp_path: Path) -> list[str]:
    """Own pictures, and values that are not the defaults."""
    rows = ["where;what"]
    for number in range(64):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg((number * 3, 9, 200 - number)))
        rows.append(f"{number}.jpg;picture {number}")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    data = f"--train-data {tmp_path}/own.csv --csv-img-key where --csv-caption-key what".split()
    return [*train_flags, *data, "--csv-separator", ";", "--lr", "1e-3", "--aug-scale", "0.5", "1"]


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let Ctrl-C come in a step."""
    original = Report.step

    def at(step: int) -> None:
        def stop(self: Report, state: Any, *arguments: Any) -> None:
            original(self, state, *arguments)
            if state.step == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Report, "step", stop)

    return at


def test_a_stopped_run_is_resumed_by_what_it_prints(
    flags: list[str], stopping: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of an epoch, and bit for bit as if nobody had stopped it."""
    whole = train(parse([*flags, "--name", "whole"]))
    stopping(11)
    assert main(["train", *flags, "--name", "stopped"]) == 75
    printed = capsys.readouterr().err.partition("SIGINT received; to resume: ")[2]
    words = shlex.split(printed)
    logs = str(whole.parent)
    assert words == f"fastclip train --resume latest --name stopped --logs {logs}".split()
    assert main(words[1:]) == 0
    said = capsys.readouterr().err
    assert "resuming" in said and " -> " not in said
    ours, theirs = (state_of(whole.parent / name, "epoch_2.pt") for name in ("stopped", "whole"))
    for key in ("state_dict", "optimizer", "rng", "data", "step"):
        assert identical(ours[key], theirs[key]), key
    own = {name: value for name, value in theirs["config"].items() if name not in OF_COMMAND}
    assert own == {name: ours["config"][name] for name in own}


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_directory_resumes_itself(
    inside: bool, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(parse([*flags, "--name", "a", "--epochs", "1"]))
    # it may have been moved
    moved = shutil.move(run, tmp_path / "b")
    monkeypatch.chdir(moved if inside else tmp_path)
    assert main(["train", "--resume", "." if inside else "b", "--epochs", "2"]) == 0
    assert checkpoint.find_latest(tmp_path / "b" / "checkpoints") == tmp_path / "b" / (
        "checkpoints/epoch_2.pt"
    )
    # under a name of its own it branches off
    given = ["--resume", str(tmp_path / "b"), "--name", "c", "--logs", str(tmp_path)]
    assert main(["train", *given, "--epochs", "3"]) == 0
    assert state_of(tmp_path / "c", "epoch_3.pt")["config"]["lr"] == 1e-3
    assert not (tmp_path / "b" / "checkpoints" / "epoch_3.pt").exists()


def test_what_is_given_wins_and_is_said(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags, "--name", "a", "--epochs", "1"]) == 0
    run = ["--resume", "latest", *flags[flags.index("--logs") :][:2], "--name", "a"]
    capsys.readouterr()
    changed = ["--epochs", "2", "--lr", "0.002", "--workers", "1", "--save-all"]
    assert main(["train", *run, *changed]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if " -> " in line]
    assert notes == [
        "note: --epochs 1 -> 2, --lr 0.001 -> 0.002; the resumed run differs from the original",
        "note: --workers 0 -> 1, --save-all False -> True; the training is as before",
    ]
    # and is the run's from now on
    assert parse(run).optim.epochs == 2
    assert parse([*run, "--config", "quickstart"]).model.model == "RN10t-64"


def test_trust_and_place_are_not_inherited(flags: list[str]) -> None:
    """A run directory from elsewhere does not vouch for itself."""
    assert set(flatten(TrainConfig())) - set(inherited(TrainConfig)) == OF_COMMAND
    run = train(parse([*flags, "--name", "a", "--epochs", "1", "--trust-checkpoint"]))
    assert "trust_checkpoint: true" in (run / SETTINGS_FILE).read_text()
    config = parse(["--resume", str(run)])
    assert not config.checkpoint.trust_checkpoint
    assert (config.log.name, config.log.logs) == (None, "logs")


def test_what_does_not_go_with_the_runs_settings_names_their_file(flags: list[str]) -> None:
    cooled = ["--lr-scheduler", "wsd", "--epochs-cooldown", "1"]
    run = train(parse([*flags, *cooled, "--name", "a"]))
    with pytest.raises(ValueError, match=r"--epochs-cooldown is for .* as in .*a/config.yaml\)"):
        parse(["--resume", str(run), "--lr-scheduler", "cosine"])
    again = parse(["--resume", str(run), "--lr-scheduler", "cosine", "--epochs-cooldown", "None"])
    assert again.optim.lr_scheduler == "cosine" and again.optim.lr == 1e-3


def test_a_mistyped_name_begins_no_run(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It would train another model on the embedded data, which nobody asked for."""
    run = train(parse([*flags, "--name", "first", "--epochs", "1"]))
    place = ["--logs", str(run.parent), "--resume", "latest", "--name", "firxt"]
    assert main(["train", *place, "--epochs", "2"]) == 1
    says = capsys.readouterr().err
    assert f"there is no run {run.parent}/firxt (there is first); check --name" in says
    assert not (run.parent / "firxt").exists()


def test_a_run_of_before_its_first_checkpoint_begins_anew_as_it_was(flags: list[str]) -> None:
    run = train(parse([*flags, "--name", "a", "--epochs", "1"]))
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    again = ["--resume", "latest", "--name", "a", "--logs", str(run.parent)]
    # flags that would do for a new run are all that there is of it
    assert parse([*again, "--train-data", "synthetic"]).optim.lr == TrainConfig().optim.lr
    assert main(["train", *again]) == 0
    assert state_of(run, "epoch_1.pt")["config"]["csv_separator"] == ";"


def test_ranks_that_read_other_settings_are_refused() -> None:
    config = parse(["--batch-size", "8"])

    class Late(World):
        """Of two ranks, of which the second has not seen the run's settings."""

        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "batch_size": "128"}]

    with pytest.raises(ValueError, match="--batch-size is 8 on rank 0 and 128 on rank 1; start"):
        _require_same(config, Late(0, 2, torch.device("cpu")))
    _require_same(config, World(0, 1, torch.device("cpu")))
