"""What a configuration makes of its training data."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastclip.data.sources import open_source
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.training_data import build_loader


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
