"""Random streams: what a seed decides, saving and restoring them, a stream for each rank."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastclip.models import checkpoint
from fastclip.train import start
from fastclip.train.config import parse
from fastclip.train.distributed import World
from fastclip.train.loop import train
from fastclip.train.streams import restore_rng, rng_state, seed_rng

CPU = torch.device("cpu")


def draw() -> list[float]:
    """Of every stream. Normal numbers come in pairs, of which the second is kept."""
    return [
        *(torch.rand(()).item(), torch.randn(()).item()),
        *(np.random.rand(), np.random.normal()),
        *(random.random(), random.gauss(0, 1)),
    ]


def test_a_state_brings_back_all_streams(tmp_path: Path) -> None:
    seed_rng(3)
    first = draw()
    # as a checkpoint holds it
    torch.save(rng_state(CPU), tmp_path / "state.pt")
    followed = [draw() for _ in range(3)]
    restore_rng(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == followed
    # each differs from the one before
    assert all(a != b for a, b in zip(first, followed[0], strict=True))


def test_a_seed_starts_all_streams() -> None:
    drawn = []
    for seed in (3, 4, 3, 2**40):
        seed_rng(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    for other in (drawn[1], drawn[3]):
        assert all(a != b for a, b in zip(drawn[0], other, strict=True))


def test_ranks_draw_different_numbers() -> None:
    """All are seeded alike for the weights, then each gets a stream, or has that of before back."""
    states: list[dict[str, Any]] = []
    drawn = []
    for rank in range(3):
        seed_rng(0)
        start._start_streams(parse([]), World(rank, 3, CPU), None)
        states.append(rng_state(CPU))
        drawn.append(draw())
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert all(x != y for x, y in zip(drawn[a], drawn[b], strict=True))
    for rank in range(3):
        seed_rng(0)
        # the last has joined since
        start._start_streams(parse([]), World(rank, 3, CPU), {"rng": states[:2]})
        assert draw() == drawn[rank]


def test_the_seed_decides_samples_and_weights(train_flags: list[str]) -> None:
    """Nothing is learned, so that a checkpoint has the weights that a run begins with."""
    still = "--epochs 1 --train-num-samples 16 --lr 0 --wd 0 --log-sample-ids".split()
    samples, weights = [], []
    for name, seed in (("a", "0"), ("b", "1"), ("c", "1")):
        run = train(parse([*train_flags, *still, "--seed", seed, "--name", name]))
        samples.append((run / "samples.jsonl").read_text())
        weights.append(checkpoint.read(run / "checkpoints" / "epoch_1.pt")["state_dict"])
    assert samples[0] != samples[1] == samples[2]
    drawn = [name for name in weights[0] if name.endswith(("conv1.weight", "_projection"))]
    assert len(drawn) == 2
    for name in drawn:
        assert not torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[1][name], weights[2][name])
