"""ZeRO, once under DeepSpeed's launcher: DDP's losses, and kill -9 of all ranks up to twice."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastclip.cli import main
from fastclip.models import checkpoint, sharded
from fastclip.train.log import read_metrics
from tests.processes import ROOT, finish, free_port, start_command, start_ranks, train_pair
from tests.train.test_kill import kill_when, last_step

# by stage: what is killed and resumed is the same code, so one stage is killed most; stage 1 saves
# as 2 does, and `test_zero.py` resumes it
KILLS = {2: 2, 3: 1}
STEPS = 30


def launch(*flags: str) -> None:
    """`fastclip train` on two ranks, with the command of the pages."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), "--module", "fastclip.cli", "train", *flags]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def by_parameter(path: Path, target: Path) -> dict[str, Tensor]:
    """Every parameter in float32, and its two moments, of a checkpoint folder."""
    assert sharded.verify(path)
    sharded.to_universal(path, target)
    found = {}
    for file in sorted((target / "zero").glob("*/*.pt")):
        content = torch.load(file, weights_only=False)
        value = content["param"] if isinstance(content, dict) else content
        if isinstance(value, Tensor):
            found[f"{file.parent.name}/{file.stem}"] = value
    return found


@pytest.fixture(scope="module")
def plain_losses() -> dict[str, list[float]]:
    """Of plain data-parallel training, computed by the first test."""
    return {}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("stage", KILLS)
def test_killed_equals_uninterrupted(
    train_flags: list[str], tmp_path: Path, stage: int, plain_losses: dict[str, list[float]]
) -> None:
    logs = tmp_path / "logs"
    flags = [*train_flags, "--train-num-samples", "240", "--log-sample-ids"]
    if not plain_losses:
        train_pair(*flags, "--name", "plain")
        plain_losses["plain"] = [line["loss"] for line in read_metrics(logs / "plain")]
    flags += ["--save-every-steps", "4", "--deepspeed", "--deepspeed_config", f"ds_zero{stage}"]
    # the launcher does the same for every stage
    (launch if stage == 2 else train_pair)(*flags, "--name", "whole")
    losses = [line["loss"] for line in read_metrics(logs / "whole")]
    assert len(losses) == STEPS
    assert losses == pytest.approx(plain_losses["plain"], rel=1e-5)

    run = logs / "killed"
    points = sorted(random.Random(stage).sample(range(6, STEPS - 4), KILLS[stage]))
    resume: list[str] = []
    for point in points:
        ranks = start_ranks(2, main, ["train", *flags, "--name", "killed", *resume])
        kill_when(ranks, lambda point=point: last_step(run) >= point)
        resume = ["--resume", "latest", "--trust-checkpoint"]
    errors = train_pair(*flags, "--name", "killed", *resume)
    assert "resuming" in errors
    assert (run / "samples.jsonl").read_text() == (logs / "whole" / "samples.jsonl").read_text()
    lines = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder)]
        for folder in (run, logs / "whole")
    ]
    assert lines[0] == lines[1], points
    # by parameter: shards have padding, whose bits mean nothing
    ours, theirs = (
        by_parameter(folder / "checkpoints" / "epoch_2", tmp_path / folder.name)
        for folder in (run, logs / "whole")
    )
    assert ours.keys() == theirs.keys() and len(ours) > 60
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name

    if stage == 2:
        check_what_a_user_does_next(run, tmp_path, flags)


def check_what_a_user_does_next(run: Path, folder: Path, flags: list[str]) -> None:
    """Pickles are not read unasked; weights go out; one process resumes."""
    latest = checkpoint.find_latest(run / "checkpoints")
    assert latest == run / "checkpoints" / "epoch_2"
    middle = run / "checkpoints" / "step_00000028"
    refused = start_command("train", *flags, "--name", "x", "--resume", str(middle))
    _, errors = refused.communicate(timeout=200)
    assert refused.returncode == 1 and "add --trust-checkpoint" in errors
    alone = ("--batch-size", "16", "--name", "alone", "--workers", "0", "--resume", str(middle))
    finish([start_command("train", *flags, *alone, "--trust-checkpoint")])
    ours = [line["loss"] for line in read_metrics(folder / "logs" / "alone")]
    theirs = [line["loss"] for line in read_metrics(run)][28:]
    # patch dropout draws other numbers for other ranks
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=0.2)

    assert main(["convert", "to-open-clip", str(run), str(folder / "no.pt")]) == 1
    assert (
        main(["convert", "to-open-clip", str(run), str(folder / "out.pt"), "--trust-checkpoint"])
        == 0
    )
    weights = checkpoint.read_weights(folder / "out.pt")
    exported = sharded.export(latest)
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
