"""`--accum-freq`: large batches in the trainer."""

import json
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint
from fastclip.ops.gemm import count_products


@pytest.mark.parametrize("loss", ["--no-siglip", "--siglip"])
def test_exact_accumulation_is_the_larger_batch(
    train_flags: list[str], tmp_path: Path, loss: str
) -> None:
    """The same samples, losses and scales as in one batch."""
    judged = ["--val-data", "synthetic"]
    model = tmp_path / "tiny.json"
    model.write_text(model.read_text().replace('"patch_dropout": 0.5', '"patch_dropout": 0.0'))
    runs = []
    for name, batch, count in (("whole", 16, 1), ("parts", 4, 4)):
        flags = ["--name", name, "--batch-size", str(batch), "--accum-freq", str(count)]
        assert main(["train", *train_flags, *flags, "--log-sample-ids", loss, *judged]) == 0
        run = tmp_path / "logs" / name
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any("val/loss" in line for line in lines)
        lines = [line for line in lines if "loss" in line]
        runs.append(([x["loss"] for x in lines], [x["logit_scale"] for x in lines], run))
    for ours, theirs in zip(runs[0][:2], runs[1][:2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if loss == "--siglip":
        biases = [fastclip.load(run).model.get_parameter("logit_bias").item() for *_, run in runs]
        assert biases[0] == pytest.approx(biases[1], rel=1e-5) and biases[0] != -10
    samples = [(run / "samples.jsonl").read_text() for *_, run in runs]
    assert samples[0] == samples[1]


def test_batch_norm_is_refused_with_accumulation(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--model", "RN10t-64", "--accum-freq", "2", "--batch-size", "2"]
    assert main(["train", *flags, "--name", "norm"]) == 1
    assert "batch normalization (visual.trunk." in capsys.readouterr().err


def test_the_recipe_for_one_machine(tmp_path: Path) -> None:
    """One step, at a sixteenth of its size; the loss sees the whole batch."""
    flags = "--config batch65536 --train-num-samples 4096 --accum-freq 4 --workers 0 --device cpu"
    with count_products() as count:
        assert main(["train", *flags.split(), "--logs", str(tmp_path), "--name", "large"]) == 0
    # exponentials of 4,096 pairs are just what a CPU keeps
    assert count.products_of(4096, 4096, 64) == 3
    (line,) = (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()
    # untrained towers distinguish nothing: ln 4096, and what their noise adds at scale 14
    assert json.loads(line)["loss"] == pytest.approx(8.32, abs=0.4)
    state = checkpoint.read(tmp_path / "large" / "checkpoints" / "epoch_1.pt")
    assert state["data"] | {"epoch": 1, "position": 0} == state["data"] and state["step"] == 1
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
