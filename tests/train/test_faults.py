"""Being stopped, ranks that die or hang, a full disk: what is kept, and what is said."""

import errno
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastclip.cli import main
from fastclip.models import checkpoint
from fastclip.train import engine
from fastclip.train.distributed import world
from fastclip.train.held_out import HeldOut
from fastclip.train.log import read_metrics
from fastclip.train.watch import Watch
from tests.processes import Forked, start_ranks
from tests.train.test_kill import last_step
from tests.train.test_loop import identical

Start = Callable[..., Forked]
DEAD_AFTER = 6


def wait_for_step(run: Path, step: int, process: Forked) -> None:
    deadline = time.monotonic() + 120
    while last_step(run) < step:
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)


def suspend(process: Forked) -> None:
    """Stop a process and its group; it has stopped when this returns."""
    os.killpg(process.pid, signal.SIGSTOP)
    state = Path(f"/proc/{process.pid}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


@pytest.fixture
def long_flags(train_flags: list[str]) -> list[str]:
    return [*train_flags, "--train-num-samples", "1600", "--log-sample-ids", "--workers", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_within_a_step(
    long_flags: list[str], start_training: Start, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "logs" / "stopped"
    # schedulers and launchers signal whole groups, loaders included
    process = start_training(*long_flags, "--name", "stopped", own_group=True)
    wait_for_step(run, 12, process)
    # asleep, so that no step is made between the two
    suspend(process)
    before = last_step(run)
    os.killpg(process.pid, number)
    os.killpg(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors[-2000:]
    assert ("Ctrl-C again ends it now" in errors) == (number == signal.SIGINT)
    resume = ["--resume", "latest", "--name", "stopped", "--logs", str(tmp_path / "logs")]
    assert f"{number.name} received; to resume: fastclip train {shlex.join(resume)}\n" in errors
    assert f"\nnext\n  fastclip train {shlex.join(resume)}\n" in errors
    latest = checkpoint.find_latest(run / "checkpoints")
    assert latest is not None
    # the step under way when the signal came, and no other
    assert before <= checkpoint.step_of(latest) == last_step(run) <= before + 1
    if number == signal.SIGTERM:
        # in processes like the first: with as many threads, sums come out alike
        for flags in ([*long_flags, "--name", "whole"], resume):
            process = start_training(*flags)
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-2000:]
        ours, theirs = (
            checkpoint.read(tmp_path / "logs" / name / "checkpoints" / "epoch_2.pt")
            for name in ("stopped", "whole")
        )
        for key in ("state_dict", "optimizer", "rng", "data", "step"):
            assert identical(ours[key], theirs[key]), key


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_run_makes_the_evaluation_that_a_signal_ended(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    epoch: int,
) -> None:
    flags = [*train_flags, "--val-data", "scenes", "--val-num-samples", "24"]
    assert main(["train", *flags, "--name", "whole"]) == 0
    measure, begun = HeldOut.__call__, []

    def signaled(self: HeldOut) -> dict[str, float]:
        begun.append(1)
        if len(begun) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self)

    monkeypatch.setattr(HeldOut, "__call__", signaled)
    assert main(["train", *flags, "--name", "stopped"]) == 75
    assert "SIGTERM received; to resume:" in capsys.readouterr().err
    logs = tmp_path / "logs"
    # not a step of the next epoch was made
    assert read_metrics(logs / "stopped")[-1]["step"] == 8 * epoch
    saved = checkpoint.find_latest(logs / "stopped" / "checkpoints")
    assert saved is not None and saved.name == f"epoch_{epoch}.pt"
    resume = ["--resume", "latest", "--name", "stopped", "--logs", str(logs)]
    assert main(["train", *resume]) == 0
    ours, theirs = (
        [line for line in read_metrics(logs / name) if "val/loss" in line]
        for name in ("stopped", "whole")
    )
    assert ours == theirs and len(ours) == 2
    ours, theirs = (
        checkpoint.read(logs / name / "checkpoints" / "epoch_2.pt") for name in ("stopped", "whole")
    )
    for key in ("state_dict", "optimizer", "rng", "data", "step"):
        assert identical(ours[key], theirs[key]), key
    # what is kept as the best is that of both epochs
    for name in ("best.json", "checkpoints"):
        ours, theirs = (logs / run / name for run in ("stopped", "whole"))
        if name == "best.json":
            assert ours.read_text() == theirs.read_text()
        else:
            assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    # what was measured once is not again
    assert main(["train", *resume]) == 0
    assert len(begun) == 3


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_one_rank_stops_all(long_flags: list[str], tmp_path: Path) -> None:
    ranks = start_ranks(2, main, ["train", *long_flags, "--name", "pair"])
    wait_for_step(tmp_path / "logs" / "pair", 5, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 75, errors[-2000:]
        assert "to resume: start 2 processes of fastclip train --resume latest --name" in errors
    latest = checkpoint.find_latest(tmp_path / "logs" / "pair" / "checkpoints")
    assert latest is not None and latest.name.startswith("step_")
    # dropout draws other numbers on each
    first, second = checkpoint.read(latest)["rng"]
    assert not torch.equal(first["torch"], second["torch"])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("killed", [0, 1])
def test_a_dead_rank_ends_the_others_and_is_named(
    long_flags: list[str], tmp_path: Path, killed: int
) -> None:
    flags = ["--name", "dead", "--dead-rank-timeout", str(DEAD_AFTER)]
    ranks = start_ranks(3, main, ["train", *long_flags, *flags])
    wait_for_step(tmp_path / "logs" / "dead", 5, ranks[0])
    ranks[killed].kill()
    began = time.monotonic()
    for index, rank in enumerate(ranks):
        _, errors = rank.communicate(timeout=60)
        if index != killed:
            assert rank.returncode == 4, errors[-2000:]
            assert f"rank {killed}" in errors, errors[-2000:]
    # the time without a heartbeat, and a few beats
    assert time.monotonic() - began < DEAD_AFTER + 15


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named(long_flags: list[str], tmp_path: Path, frozen: int) -> None:
    """Its sockets stay open, so that no collective notices."""
    flags = ["--name", "frozen", "--dead-rank-timeout", str(DEAD_AFTER)]
    ranks = start_ranks(2, main, ["train", *long_flags, *flags])
    wait_for_step(tmp_path / "logs" / "frozen", 5, ranks[0])
    ranks[frozen].send_signal(signal.SIGSTOP)
    other = ranks[1 - frozen]
    try:
        _, errors = other.communicate(timeout=DEAD_AFTER + 30)
    finally:
        ranks[frozen].kill()
        ranks[frozen].communicate()
    assert other.returncode == 4
    place = f" ({socket.gethostname()}, process {ranks[1].pid})"
    if frozen == 0:
        place = ", which keeps the watch,"
    assert f"rank {frozen}{place} has sent no heartbeat for {DEAD_AFTER} s" in errors


def healthy(seconds: tuple[int, int]) -> None:
    """A rank that is late at the end."""
    with world("cpu") as here, Watch(here, dead_after=5, data_within=60):
        print("watching", flush=True)
        time.sleep(seconds[here.rank])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("suspended", [False, True])
def test_a_late_or_suspended_run_is_healthy(suspended: bool) -> None:
    """The first rank busy at the end for longer than the limit; all stopped and continued."""
    seconds = (4, 4) if suspended else (12, 0)
    ranks = start_ranks(2, healthy, seconds)
    if suspended:
        for rank in ranks:
            while rank.output() != "watching\n":
                assert rank.poll() is None
                time.sleep(0.01)
        time.sleep(1.5)
        for number, pause in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
            for rank in ranks:
                rank.send_signal(number)
            time.sleep(pause)
    for rank in ranks:
        _, errors = rank.communicate(timeout=90)
        assert rank.returncode == 0, errors[-2000:]


def hanging(fails: bool) -> None:
    """A rank whose second has no data, or an error."""
    with world("cpu") as here, Watch(here, dead_after=60, data_within=2) as watch:
        if here.rank == 1:
            if fails:
                raise ValueError("the shard is gone")
            with watch.waiting_for_data(lambda: "process 7 reads 3.tar"):
                time.sleep(600)
        here.barrier()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (False, "(--data-timeout); process 7 reads 3.tar"),
        (True, "rank 1 failed: ValueError: the shard is gone"),
    ],
)
def test_a_rank_without_data_ends_all(fails: bool, says: str) -> None:
    ranks = start_ranks(3, hanging, fails)
    errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    for index in (0, 2):
        assert says in errors[index] and "rank 1" in errors[index], errors[index][-2000:]


def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = engine.checkpoint.write
    full: set[str] = set()

    def write(path: Path, content: dict) -> None:
        if path.name in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    monkeypatch.setattr(engine.checkpoint, "write", write)
    full |= {"step_00000006.pt", "epoch_1.pt"}
    flags = [*train_flags, "--name", "full", "--save-every-steps", "3"]
    assert main(["train", *flags]) == 0
    says = capsys.readouterr().err
    assert "step_00000006 could not be written: [Errno 28] No space left on device" in says
    names = {p.name for p in (tmp_path / "logs" / "full" / "checkpoints").glob("*.pt")}
    assert names == {"step_00000012.pt", "step_00000015.pt", "epoch_2.pt"} and "epoch_1" in says

    # the last one is what the run was for
    full.add("epoch_2.pt")
    assert main(["train", *train_flags, "--name", "lost", "--save-every-steps", "3"]) == 1
    says = capsys.readouterr().err
    assert "earlier ones are kept" in says
    latest = checkpoint.find_latest(tmp_path / "logs" / "lost" / "checkpoints")
    assert latest is not None and latest.name == "step_00000015.pt"
