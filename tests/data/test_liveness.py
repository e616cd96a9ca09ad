"""Loader processes that hang, die or are slow: reported with the shard, within the time stated."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import ROOT, tiny_model, train_flags

__all__ = ["tiny_model", "train_flags"]

# A run of which one shard, when first read in a loader process, does what the test wants.
SCRIPT = """
import os, signal, sys, time
from fastclip.cli import main
from fastclip.data.shards import ShardSource
from fastclip.train import watch
watch.SLOW_BATCH = 1.0
read = ShardSource.read
def reading(self, shard, index, *, pixels=True):
    if self.names[shard].endswith("bad.tar") and not os.path.exists({once!r}):
        {does}
    return read(self, shard, index, pixels=pixels)
ShardSource.read = reading
sys.exit(main(["train", *sys.argv[1:]]))
"""


def train(
    does: str, flags: list[str], shards: str, once: Path
) -> tuple[subprocess.CompletedProcess[str], float]:
    script = SCRIPT.format(does=does.format(once=once), once=str(once))
    command = [sys.executable, "-c", script, *flags, "--train-data", shards]
    command += ["--workers", "2", "--train-num-samples", "1000", "--name", "run"]
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - started


@pytest.fixture
def shards(make_shard: Callable[..., Path]) -> str:
    good, bad = make_shard("good.tar", samples=40), make_shard("bad.tar", samples=24)
    return f"{good}::{bad}"


def test_a_hung_loader_ends_the_run_and_its_shard_is_named(
    train_flags: list[str], shards: str, tmp_path: Path
) -> None:
    flags = [*train_flags, "--data-timeout", "4"]
    done, seconds = train("time.sleep(600)", flags, shards, tmp_path / "once")
    assert done.returncode == 4, done.stderr[-2000:]
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: rank 0")]
    assert notes and all("for a batch; process" in n and "bad.tar for" in n for n in notes)
    (stopped,) = (line for line in done.stderr.splitlines() if "stopped: rank 0" in line)
    assert "(--data-timeout); process" in stopped and "bad.tar for" in stopped
    # four seconds of waiting, and what the start takes
    assert seconds < 60


def test_a_dead_loader_is_reported_with_its_shard(
    train_flags: list[str], shards: str, tmp_path: Path
) -> None:
    done, _ = train("os.kill(os.getpid(), signal.SIGKILL)", train_flags, shards, tmp_path / "once")
    assert done.returncode == 1, done.stderr[-2000:]
    (error,) = (line for line in done.stderr.splitlines() if "error:" in line)
    assert "killed" in error.lower() and "bad.tar for" in error and "lower --workers" in error
    assert "Traceback" not in done.stderr


def test_a_slow_loader_is_reported_and_waited_for(
    train_flags: list[str], shards: str, tmp_path: Path
) -> None:
    does = "open({once!r}, 'w').close(); time.sleep(3)".replace("{once!r}", "'{once}'")
    done, _ = train(does, train_flags, shards, tmp_path / "once")
    assert done.returncode == 0, done.stderr[-2000:]
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: rank 0")]
    assert notes and all("bad.tar for" in note for note in notes)
