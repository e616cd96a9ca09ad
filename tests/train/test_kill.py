"""kill -9 at random steps and while a checkpoint is written, then resume: the same bits."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastclip.atomic import PARTIAL_SUFFIX
from fastclip.models import checkpoint
from tests.processes import ROOT, Forked
from tests.train.test_loop import identical

# by loader processes
KILLS = {0: 2, 2: 4}
ATTEMPTS = 6
STEPS = 200

Start = Callable[..., Forked]


def last_step(run: Path) -> int:
    path = run / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len(lines)


def kill_when(ranks: Sequence[Forked], condition: Callable[[], bool]) -> None:
    """Kill all ranks of a run at once."""
    deadline = time.monotonic() + 300
    while not condition():
        ended = [rank for rank in ranks if rank.poll() is not None]
        late = time.monotonic() > deadline
        if ended or late:
            for rank in ranks:
                rank.kill()
            said = "".join(rank.communicate()[1] for rank in ranks)
            reason = "never came to the point where it should be killed" if late else "ended before"
            pytest.fail(f"the run {reason}: {said[-2000:]}")
        # fine enough to hit the writing of a checkpoint, which takes some milliseconds
        time.sleep(0.0005)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_equals_uninterrupted(
    train_flags: list[str], start_training: Start, tmp_path: Path, workers: int
) -> None:
    flags = [*train_flags, "--train-num-samples", "800", "--workers", str(workers)]
    flags += ["--save-every-steps", "7", "--log-sample-ids", "--save-all"]
    logs = tmp_path / "logs"
    whole = start_training(*flags, "--name", "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors[-2000:]

    run = logs / "killed"
    resume = ["--name", "killed", "--resume", "latest"]
    rng = random.Random(workers)
    # increasing, so that each kill hits new ground
    points = sorted(rng.sample(range(10, STEPS // 2), KILLS[workers]))
    for number, point in enumerate(points):
        process = start_training(*flags, *(resume if number else resume[:2]))
        kill_when([process], lambda point=point: last_step(run) >= point)
        assert last_step(run) < STEPS
    # and one while a checkpoint is being written; the writer may just finish, so try some times
    partial = f"step_*.pt{PARTIAL_SUFFIX}"
    for _ in range(ATTEMPTS):
        process = start_training(*flags, *resume)
        kill_when([process], lambda: any((run / "checkpoints").glob(partial)))
        torn = list((run / "checkpoints").glob(partial))
        if torn:
            break
    # in a new interpreter, whose sets have other orders
    final = subprocess.run(
        [sys.executable, "-m", "fastclip.cli", "train", *flags, *resume],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert final.returncode == 0, final.stderr[-2000:]
    assert torn, "no kill hit a checkpoint in writing"

    for name in ("epoch_1.pt", "epoch_2.pt", "step_00000196.pt"):
        ours = checkpoint.read(run / "checkpoints" / name)
        theirs = checkpoint.read(logs / "whole" / "checkpoints" / name)
        for key in ("state_dict", "optimizer", "rng", "data", "step", "epoch"):
            assert identical(ours[key], theirs[key]), (name, key)
    # every step of the resumed run saw the very samples of the uninterrupted one
    ours, theirs = (
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (run, logs / "whole")
    )
    assert len(theirs) == STEPS and ours == theirs
