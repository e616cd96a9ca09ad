"""kill -9 at random steps and while a checkpoint is written, then resume: the same bits."""

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.atomic import PARTIAL_SUFFIX
from fastclip.models import checkpoint
from tests.train.test_loop import identical

# by loader processes
KILLS = {0: 2, 2: 4}
ATTEMPTS = 6
STEPS = 200

Start = Callable[..., subprocess.Popen[str]]


def last_step(run: Path) -> int:
    path = run / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len(lines)


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the run ended before it was killed: {process.communicate()[1][-2000:]}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("the run never came to the point where it should be killed")
        # fine enough to hit the writing of a checkpoint, which takes some milliseconds
        time.sleep(0.0005)
    process.kill()
    process.wait()


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
    rng = random.Random(workers)
    # increasing, so that each kill hits new ground
    points = sorted(rng.sample(range(10, STEPS // 2), KILLS[workers]))
    for number, point in enumerate(points):
        resume = ["--resume", "latest"] if number else []
        process = start_training(*flags, "--name", "killed", *resume)
        kill_when(process, lambda point=point: last_step(run) >= point)
        assert last_step(run) < STEPS
    # and one while a checkpoint is being written; the writer may just finish, so try some times
    partial = f"step_*.pt{PARTIAL_SUFFIX}"
    for _ in range(ATTEMPTS):
        process = start_training(*flags, "--name", "killed", "--resume", "latest")
        kill_when(process, lambda: any((run / "checkpoints").glob(partial)))
        torn = list((run / "checkpoints").glob(partial))
        if torn:
            break
    final = start_training(*flags, "--name", "killed", "--resume", "latest")
    _, errors = final.communicate(timeout=300)
    assert final.returncode == 0, errors[-2000:]
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
