"""`fastclip train --fsdp` on two gloo ranks: kill -9 and resume, and what is done with a run."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint, sharded
from fastclip.train.log import read_metrics
from tests.train.test_ddp import torchrun
from tests.train.test_kill import last_step

STEPS = 20
KILLED_AT = 11


def start(ranks: int, *flags: str) -> Any:
    """`fastclip train` on so many processes, which are under way."""
    multiprocessing.set_forkserver_preload(["open_clip", "tests.train.test_fsdp_kill"])
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return torch.multiprocessing.start_processes(
        _rank, (ranks, port, flags), nprocs=ranks, join=False, start_method="forkserver"
    )


def _rank(rank: int, ranks: int, port: int, flags: tuple[str, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    torch.set_num_threads(1)
    assert main(["train", *flags]) == 0


def finish(ranks: int, *flags: str) -> None:
    under_way = start(ranks, *flags)
    while not under_way.join():
        pass


def kill_when(under_way: Any, reached: Callable[[], bool]) -> None:
    """Kill all ranks at once."""
    end = time.monotonic() + 200
    while not reached():
        assert all(process.is_alive() for process in under_way.processes)
        assert time.monotonic() < end
        time.sleep(0.001)
    for process in under_way.processes:
        os.kill(process.pid, signal.SIGKILL)
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
        while not under_way.join():
            pass


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
    kill_when(start(2, *flags, "--name", "killed"), lambda: last_step(run) >= KILLED_AT)
    assert last_step(run) < STEPS
    finish(2, *flags, "--name", "killed", "--resume", "latest")
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
    finish(1, *flags, "--batch-size", "16", "--name", "alone", "--resume", str(middle))
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
