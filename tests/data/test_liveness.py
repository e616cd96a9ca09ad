"""Loader processes that hang, die or are slow: reported with the shard, within the time stated."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclip.cli import main
from fastclip.data.shards import ShardSource
from fastclip.train import watch
from tests.processes import Forked
from tests.train.conftest import tiny_model, train_flags

__all__ = ["tiny_model", "train_flags"]

Fault = Callable[[Path], None]


def hang(once: Path) -> None:
    time.sleep(600)


def die(once: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dawdle(once: Path) -> None:
    once.touch()
    time.sleep(3)


def train_with(fault: Fault, once: Path, flags: list[str]) -> int:
    """A run with a fault where a loader process reads one of the shards, until `once` is there."""
    watch.SLOW_BATCH = 1.0
    read = ShardSource.read

    def reading(self: ShardSource, shard: int, index: int, *, pixels: bool = True) -> Any:
        if self.names[shard].endswith("bad.tar") and not once.exists():
            fault(once)
        return read(self, shard, index, pixels=pixels)

    ShardSource.read = reading  # type: ignore[method-assign]
    return main(["train", *flags])


def train(fault: Fault, flags: list[str], shards: str, folder: Path) -> tuple[int | None, str]:
    """The exit status, and what it writes on standard error."""
    flags = [*flags, "--train-data", shards, "--workers", "2", "--train-num-samples", "1000"]
    process = Forked(train_with, fault, folder / "once", [*flags, "--name", "run"])
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.fixture
def shards(make_shard: Callable[..., Path]) -> str:
    good, bad = make_shard("good.tar", samples=40), make_shard("bad.tar", samples=24)
    return f"{good}::{bad}"


def test_a_hung_loader_ends_the_run_and_its_shard_is_named(
    train_flags: list[str], shards: str, tmp_path: Path
) -> None:
    flags = [*train_flags, "--data-timeout", "4"]
    started = time.monotonic()
    status, errors = train(hang, flags, shards, tmp_path)
    seconds = time.monotonic() - started
    assert status == 4, errors[-2000:]
    notes = [line for line in errors.splitlines() if line.startswith("note: rank 0")]
    assert notes and all("for a batch; process" in n and "bad.tar for" in n for n in notes)
    (stopped,) = (line for line in errors.splitlines() if "stopped: rank 0" in line)
    assert "(--data-timeout); process" in stopped and "bad.tar for" in stopped
    # four seconds of waiting, and what the start takes
    assert seconds < 60


def test_a_dead_loader_is_reported_with_its_shard(
    train_flags: list[str], shards: str, tmp_path: Path
) -> None:
    status, errors = train(die, train_flags, shards, tmp_path)
    assert status == 1, errors[-2000:]
    (error,) = (line for line in errors.splitlines() if "error:" in line)
    assert "killed" in error.lower() and "bad.tar for" in error and "lower --workers" in error
    assert "Traceback" not in errors


def test_a_slow_loader_is_reported_and_waited_for(
    train_flags: list[str], shards: str, tmp_path: Path
) -> None:
    status, errors = train(dawdle, train_flags, shards, tmp_path)
    assert status == 0, errors[-2000:]
    notes = [line for line in errors.splitlines() if line.startswith("note: rank 0")]
    assert notes and all("bad.tar for" in note for note in notes)
