"""Duplicates of a batch: what the loader finds, what the loss makes of it, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fastclip.data.augment import Augmentation
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.samples import Sample
from fastclip.data.training_samples import TrainingSamples, grouped_pairs
from fastclip.functional import clip_loss, siglip_loss
from fastclip.train.config import TrainConfig, parse
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.objective import ClipObjective
from tests.conftest import jpeg
from tests.ops.cases import unit
from tests.processes import train_pair


class Duplicates:
    """Six samples; captions repeat every third, images every second."""

    counts = (6,)

    def read(self, shard: int, index: int, pixels: bool = True) -> Sample:
        image = Image.new("RGB", (8, 8), (40 * (index % 2), 0, 0))
        file = io.BytesIO()
        image.save(file, "png")
        texts = (f"caption {index % 3}",)
        return Sample(str(index), image, texts, encoded=file.getvalue())

    def drain_faults(self) -> list:
        return []

    def place(self, shard: int) -> str:
        return "memory"


def batch_of(group_by: Any) -> dict[str, Any]:
    samples = TrainingSamples(
        Duplicates(),  # type: ignore[arg-type]
        Order((6,), seed=0),
        Augmentation(8),
        lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64),
        group_by=group_by,
    )
    return next(iter(TrainingLoader(samples, batch_size=6).batches(0)))


@pytest.mark.parametrize("group_by, period", [("caption", 3), ("image", 2)])
def test_duplicates_have_one_group(group_by: str, period: int) -> None:
    batch = batch_of(group_by)
    kind = torch.tensor([int(key) % period for key in batch["key"]])
    group = batch["group"]
    assert group.dtype == torch.int64
    assert torch.equal(group[:, None] == group, kind[:, None] == kind)
    assert grouped_pairs(group) == {3: 3, 2: 6}[period]
    assert "group" not in batch_of(None)


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("role", ["excluded", "positive"])
def test_the_loss_takes_them(role: str, siglip: bool) -> None:
    config = TrainConfig.from_flat(train_data="x", group_duplicates=role, siglip=siglip)
    objective = ClipObjective(nn.Module(), config)
    features = {"image_features": unit(6, 4, 0), "text_features": unit(6, 4, 1)}
    shared = {"logit_scale": torch.tensor(5.0).double(), "logit_bias": torch.tensor(-5.0).double()}

    def towers(images: Any, texts: Any) -> dict[str, torch.Tensor]:
        return {**features, **shared}

    group = torch.tensor([0, 1, 0, 2, 1, 3])
    output = objective.outputs(towers, {"images": [None], "texts": [None], "group": group})
    loss = siglip_loss if siglip else clip_loss
    groups = {"row_group": group, "column_group": group, "group_role": role}
    want = loss(*features.values(), *shared.values(), **groups)
    assert torch.equal(objective.loss(output), want)
    assert not torch.equal(want, loss(*features.values(), *shared.values()))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"group_by": "image"}, "--group-by is for --group-duplicates"),
        ({"group_duplicates": "excluded", "hard_negatives": 1}, "without --hard-negatives"),
        ({"group_duplicates": "excluded", "objective": "simclr"}, "is for --objective clip"),
        ({"group_duplicates": "positive", "loss": "global"}, "not go with --group-duplicates"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_flat(train_data="x", **flags)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_and_micro_batches_are_one_batch(
    train_flags: list[str], tmp_path: Path, make_shard: Callable[..., Path]
) -> None:
    """Five captions for 32 images: duplicates are on one rank and on two."""
    model = tmp_path / "tiny.json"
    model.write_text(model.read_text().replace('"patch_dropout": 0.5', '"patch_dropout": 0.0'))
    members = []
    for i in range(32):
        members.append((f"{i}.jpg", jpeg((i * 37 % 256, i * 91 % 256, i * 13 % 256))))
        members.append((f"{i}.txt", f"caption number {i % 5}".encode()))
    flags = [*train_flags, "--train-data", str(make_shard(members=members)), "--epochs", "1"]
    flags[flags.index("--train-num-samples") + 1] = "32"
    grouped = [*flags, "--group-duplicates", "excluded"]
    plain, alone = (
        train(parse([*given, "--name", name]))
        for given, name in ((flags, "plain"), (grouped, "alone"))
    )
    parts = train(parse([*grouped, "--name", "parts", "--batch-size", "2", "--accum-freq", "4"]))
    train_pair(*grouped, "--batch-size", "4", "--name", "pair")
    pair = tmp_path / "logs" / "pair"
    assert losses(alone) != pytest.approx(losses(plain), rel=1e-2)
    assert losses(parts) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(pair) == pytest.approx(losses(alone), rel=1e-5)
