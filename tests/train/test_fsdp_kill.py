"""`fastclip train --fsdp` on two gloo ranks: kill -9 and resume, and what is done with a run."""

from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint, sharded
from fastclip.train.log import read_metrics
from tests.processes import finish, start_command, start_ranks, train_pair
from tests.train.test_ddp import torchrun
from tests.train.test_kill import kill_when, last_step

STEPS = 20
KILLED_AT = 11


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that is sharded, whole."""
    from fastclip.models import distributed_checkpoint

    sharded.require_whole(folder)
    return distributed_checkpoint.export(folder, "")


@pytest.mark.slow
@pytest.mark.dist
def test_killed_equals_uninterrupted(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    flags = [*train_flags, "--train-num-samples", "160", "--log-sample-ids", "--fsdp"]
    flags += ["--save-every-steps", "4", "--ema", "0.9", "--val-data", "scenes:shift=style"]
    # under torch's launcher, whose exit status counts
    torchrun(*flags, "--name", "whole")
    run = logs / "killed"
    ranks = start_ranks(2, main, ["train", *flags, "--name", "killed"])
    kill_when(ranks, lambda: last_step(run) >= KILLED_AT)
    assert last_step(run) < STEPS
    train_pair(*flags, "--name", "killed", "--resume", "latest")
    lines = [
        [
            (line["step"], line["loss"], line["grad_norm"])
            for line in read_metrics(folder)
            if "loss" in line
        ]
        for folder in (run, logs / "whole")
    ]
    assert len(lines[0]) == STEPS and lines[0] == lines[1]
    ours, theirs = (tensors(folder / "checkpoints" / "epoch_2") for folder in (run, logs / "whole"))
    assert ours.keys() == theirs.keys() and len(ours) > 60
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    check_what_a_user_does_next(run, tmp_path, flags)
    capsys.readouterr()
    check_other_engines(run, flags, capsys)


def check_what_a_user_does_next(run: Path, folder: Path, flags: list[str]) -> None:
    """It is evaluated, loaded and exported without trust, and resumed by one process."""
    scores = [line for line in read_metrics(run) if "val/loss" in line]
    assert len(scores) == 2 and all(line["val/loss"] != line["val/loss_ema"] for line in scores)
    latest = run / "checkpoints" / "epoch_2"
    assert checkpoint.find_latest(run / "checkpoints") == latest
    weights = checkpoint.read_weights(latest)
    for average in (False, True):
        loaded = fastclip.load(run, average=average).model.state_dict()
        assert torch.equal(loaded["visual.proj"], weights["visual.proj"]) != average
    assert main(["convert", "to-open-clip", str(run), str(folder / "out.pt")]) == 0
    exported = checkpoint.read_weights(folder / "out.pt")
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    middle = run / "checkpoints" / "step_00000016"
    alone = ["--batch-size", "16", "--name", "alone", "--resume", str(middle)]
    finish([start_command("train", *flags, *alone)])
    ours = [line["loss"] for line in read_metrics(folder / "logs" / "alone") if "loss" in line]
    theirs = [line["loss"] for line in read_metrics(run) if "loss" in line][16:]
    # patch dropout draws other numbers for other ranks
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=0.2)


def check_other_engines(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They say how to resume."""
    middle = str(run / "checkpoints" / "step_00000016")
    assert (
        main(
            ["train", *flags, "--no-fsdp", "--batch-size", "16", "--name", "x", "--resume", middle]
        )
        == 1
    )
    assert "of a run with --fsdp; resume with it, on any number" in capsys.readouterr().err
    assert main(["convert", "to-universal", middle, str(run / "universal")]) == 1
    assert "it resumes on any number of processes" in capsys.readouterr().err
