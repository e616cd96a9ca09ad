"""What a configuration makes of its training data."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastclip.cli import main
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.shards import ShardSource
from fastclip.data.sources import open_source
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.training_data import build_loader, require_same_data
from tests.processes import start_ranks


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 4, dtype=torch.long)


@pytest.mark.parametrize("quality", ["alt", "dense"])
@pytest.mark.parametrize("world", ["scenes", "collages"])
def test_embedded_worlds_bring_hard_negatives_that_are_known_to_be_false(
    world: str, quality: str
) -> None:
    """Whatever caption is drawn; a rule, which knows a text alone, might make a true one."""
    data = f"{world}:objects=2,caption={quality}"
    flags: dict[str, Any] = {"hard_negatives": 2, "batch_size": 16, "train_num_samples": 32}
    config = TrainConfig.from_flat(train_data=data, workers=0, **flags)
    model: Any = SimpleNamespace(preprocess_config={"size": 32}, tokenizer=tokenize)
    loader = build_loader(config, model, [], World(0, 1, torch.device("cpu")))
    batch = next(loader.batches(epoch=0))
    source = open_source(data, split="train", count=32, negatives=True)
    for key, texts in zip(batch["key"], batch["false_captions"], strict=True):
        own = source.read(0, int(key.removeprefix("train"))).negatives
        assert len(texts) == 2 and set(texts) <= set(own)


def loader_of(data: Path) -> TrainingLoader:
    config = TrainConfig.from_flat(train_data=str(data), workers=0, batch_size=4)
    model: Any = SimpleNamespace(preprocess_config={"size": 32}, tokenizer=tokenize)
    return build_loader(config, model, [], World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("samples", "says"),
    [((10, 4), "14 in 3 steps on rank 1"), ((8, 8), "16 in 4 steps on rank 1")],
    ids=["fewer", "in other shards"],
)
def test_ranks_that_see_other_data_are_refused(
    samples: tuple[int, int], says: str, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    """Of three ranks the second has other shards."""
    said: list[Any] = []

    class Alone(World):
        """Keeps what a rank says to the others."""

        def gather(self, value: Any) -> list[Any]:
            said.append(value)
            return [value]

    class Together(World):
        """Hears what all of them say."""

        def gather(self, value: Any) -> list[Any]:
            return said

    for number, counts in enumerate([(12, 4), samples, (12, 4)]):
        (tmp_path / str(number)).mkdir()
        for i, count in enumerate(counts):
            make_shard(f"{number}/{i}.tar", samples=count, first=100 * i)
        loader = loader_of(tmp_path / str(number) / "{0..1}.tar")
        require_same_data(loader, Alone(number, 3, torch.device("cpu")))
    with pytest.raises(ValueError, match=f"16 samples in 4 steps an epoch on rank 0, and {says}"):
        require_same_data(loader, Together(2, 3, torch.device("cpu")))
    said[1] = said[0]
    require_same_data(loader, Together(2, 3, torch.device("cpu")))


def train_with_less(flags: list[str]) -> int:
    """A rank, of which the second has fewer samples."""
    less = ["--train-num-samples", "48"] if os.environ["RANK"] == "1" else []
    return main(["train", *flags, *less])


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_does_not_begin_where_ranks_see_other_data(train_flags: list[str]) -> None:
    ranks = start_ranks(2, train_with_less, [*train_flags, "--name", "apart"])
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 1, errors[-2000:]
        assert "64 samples in 4 steps an epoch on rank 0, and 48 in 3 steps" in errors


@pytest.mark.parametrize(("window", "seed"), [(3, 5), (20, 0)])
def test_the_order_is_that_of_the_flags(
    window: int, seed: int, make_shard: Callable[..., Path]
) -> None:
    shards = "::".join(str(make_shard(f"{i}.tar", samples=6, first=6 * i)) for i in range(2))
    flags: dict[str, Any] = {"shuffle_window": window, "seed": seed, "batch_size": 4}
    config = TrainConfig.from_flat(train_data=shards, workers=0, **flags)
    model: Any = SimpleNamespace(preprocess_config={"size": 32}, tokenizer=tokenize)
    samples = build_loader(config, model, [], World(0, 1, torch.device("cpu"))).samples
    assert samples.order == Order((6, 6), seed, window)
    # places in the shards are kept of as many samples
    assert isinstance(samples.source, ShardSource) and samples.source.window == window
