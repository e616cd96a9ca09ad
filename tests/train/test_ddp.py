"""Two gloo ranks, once under torchrun, against one process at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastclip.cli import main
from fastclip.models import checkpoint
from fastclip.train.config import parse
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from tests.processes import ROOT, train_pair
from tests.train.test_loop import identical

STEPS = 50


def torchrun(*flags: str) -> str:
    """Run `fastclip train` on two ranks; returns what it wrote on standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    # "--": torchrun's own parser else takes --logs for an abbreviation of --logs-specs
    result = subprocess.run(
        [*command, "-m", "--", "fastclip.cli", "train", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.fixture
def flags(train_flags: list[str], tmp_path: Path) -> list[str]:
    """25 steps of 16 samples an epoch, without dropout, which draws per rank."""
    model = tmp_path / "tiny.json"
    model.write_text(model.read_text().replace('"patch_dropout": 0.5', '"patch_dropout": 0.0'))
    return [*train_flags, "--train-num-samples", "400", "--log-sample-ids"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_one_process_and_resume_exactly(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = train(parse([*flags, "--name", "alone", "--batch-size", "16"]))
    two = [*flags, "--batch-size", "8", "--save-every-steps", "30"]
    errors = torchrun(*two, "--name", "pair")
    assert "16 samples = 8 x 2 processes" in errors and errors.count("caption   ") == 2
    pair = tmp_path / "logs" / "pair"
    ours, theirs = ([line["loss"] for line in read_metrics(run)] for run in (pair, alone))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)

    source = pair / "checkpoints" / "step_00000030.pt"
    train_pair(*two, "--name", "again", "--resume", str(source))
    last = [
        checkpoint.read(tmp_path / "logs" / name / "checkpoints" / "epoch_2.pt")
        for name in ("pair", "again")
    ]
    for key in ("state_dict", "optimizer", "rng", "data", "step"):
        assert identical(last[0][key], last[1][key]), key
    # and one process resumes from two: the same samples in the same order
    main(["train", *flags, "--name", "one", "--batch-size", "16", "--resume", str(source)])
    files = [tmp_path / "logs" / name / "samples.jsonl" for name in ("one", "alone")]
    assert files[1].read_text().endswith(files[0].read_text())
    assert len(files[0].read_text().splitlines()) == 20
    assert "a step has" not in capsys.readouterr().err
    # with the flags of two, its steps are half as large
    main(["train", *flags, "--name", "half", "--batch-size", "8", "--resume", str(source)])
    assert "a step has 8 samples, in the original run 16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_with_the_sigmoid_loss_in_a_ring(flags: list[str], tmp_path: Path) -> None:
    """And exact accumulation."""
    flags = [*flags, "--siglip", "--train-num-samples", "160"]
    alone = train(parse([*flags, "--name", "alone", "--batch-size", "16"]))
    ring = ["--batch-size", "4", "--accum-freq", "2", "--loss-dist-impl", "ring"]
    train_pair(*flags, *ring, "--name", "pair")
    lines = [read_metrics(run) for run in (tmp_path / "logs" / "pair", alone)]
    for name, tolerance in (("loss", 1e-5), ("logit_scale", 1e-6)):
        ours, theirs = ([line[name] for line in run if name in line] for run in lines)
        assert len(ours) > 0 and ours == pytest.approx(theirs, rel=tolerance), name
    exchanged = [line["loss_exchange_mib"] for line in lines[0] if "loss" in line]
    assert min(exchanged) > 0


@pytest.mark.dist
def test_a_global_batch_that_cannot_follow_is_refused(flags: list[str]) -> None:
    run = train(parse([*flags, "--name", "a", "--save-every-steps", "3", "--epochs", "1"]))
    source = next(iter((run / "checkpoints").glob("step_*.pt")))
    position = checkpoint.read(source)["data"]["position"]
    with pytest.raises(ValueError, match=f"was saved at sample {position} of an epoch"):
        train(parse([*flags, "--name", "b", "--batch-size", "100", "--resume", str(source)]))


def test_a_world_without_ranks_is_reported(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", *flags]) == 1
    assert "start with torchrun" in capsys.readouterr().err
