"""A training step beside open_clip: the same work, counted; the same losses."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastclip.bench import train_step
from fastclip.bench.train_step import FUSED, OURS, PATCHED, THEIRS, Batch, StepSettings
from fastclip.cli import main
from fastclip.models.clip import create
from fastclip.ops.gemm import count_products

MODEL, SIZE = "ViT-mini-16px", 8


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(create(MODEL), SIZE)


def flop(name: str, batch: Batch, settings: StepSettings) -> int:
    """Of one call, the optimizer's state already there."""
    call = train_step.TRAINERS[name](MODEL, batch, settings)
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_both_do_the_same_products(batch: Batch) -> None:
    """Towers and gradients cost both the same; of the loss fastclip has 3 products, open_clip 6."""
    one = 2 * SIZE * SIZE * 64
    settings = StepSettings(steps=1)
    found = {name: flop(name, batch, settings) for name in train_step.TRAINERS}
    towers = found[THEIRS] - 6 * one
    assert found == {OURS: towers + 3 * one, THEIRS: found[THEIRS], FUSED: found[THEIRS],
                     PATCHED: towers + 3 * one}  # fmt: skip
    # a call is as many steps as it says
    assert flop(OURS, batch, StepSettings(steps=3)) == 3 * found[OURS]


def test_a_step_has_the_losses_products_once(batch: Batch) -> None:
    call = train_step.TRAINERS[OURS](MODEL, batch, StepSettings(steps=1))
    with count_products() as count:
        call()
    assert count.products_of(SIZE, SIZE, 64) == 3


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_they_train_alike(batch: Batch, precision: str) -> None:
    """After several calls the losses, which AdamW has moved, are still the same."""
    settings = StepSettings(precision, grad_clip_norm=0.5, steps=5)
    found = {}
    for name, build in train_step.TRAINERS.items():
        call = build(MODEL, batch, settings)
        found[name] = [call() for _ in range(3)]
    exact = precision == "fp32"
    for losses in found.values():
        assert losses[2] < losses[0] - 1e-3
        # under autocast the towers round to 8 bits, another sum rounds elsewhere
        assert losses == pytest.approx(found[THEIRS], rel=1e-5 if exact else 5e-3)


def test_patching_ends_with_the_call(batch: Batch) -> None:
    from open_clip.loss import ClipLoss

    before = ClipLoss.forward
    train_step.TRAINERS[PATCHED](MODEL, batch, StepSettings(steps=1))()
    assert ClipLoss.forward is before


def test_rows_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train-step.json"
    flags = f"--towers {MODEL}:4 --steps 2 --rounds 3 --warmup 0 --device cpu --output {file}"
    assert main(["bench", "train-step", *flags.split()]) == 0
    assert "samples/s" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["benchmark"] == "train-step" and content["settings"]["steps"] == 2
    rows = {row["baseline"]: row for row in content["results"]}
    assert list(rows) == list(train_step.TRAINERS)
    for row in rows.values():
        assert row["status"] == "ok" and row["p20"] <= row["p50"] <= row["p80"]
        assert row["ratio"] == pytest.approx(rows[THEIRS]["p50"] / row["p50"])
        assert row["samples_per_second"] == pytest.approx(4 / row["p50"])
        assert row["loss_difference"] < 1e-5


@pytest.mark.parametrize("tower", ["ViT-mini-16px", "ViT-mini-16px:1", ":8", "ViT-mini-16px:x"])
def test_towers_that_are_none(tower: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train-step", "--towers", tower, "--device", "cpu"]) == 1
    assert "give MODEL:BATCH" in capsys.readouterr().err


def test_pixels_are_normalized_alike(batch: Batch) -> None:
    settings = StepSettings(steps=1)
    assert batch.pixels.dtype == torch.uint8 and batch.images.dtype == torch.float32
    losses = [train_step.TRAINERS[name](MODEL, batch, settings)() for name in (OURS, THEIRS)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
