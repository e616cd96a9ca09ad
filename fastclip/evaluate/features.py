"""Normalised features of a data set, in the data's own order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastclip.data.faults import FaultLog
from fastclip.data.loader import EvaluationSamples, collate
from fastclip.data.samples import Source
from fastclip.device import autocast
from fastclip.models.clip import Model
from fastclip.models.controls import Classifier


@dataclass
class ImageFeatures:
    """Features of every readable sample and what came with them.

    features: (N, D) float32, normalised; of a classifier its logits. texts (all captions of each
    image), labels and keys have length N.
    """

    features: Tensor
    texts: list[tuple[str, ...]]
    labels: list[int | None]
    keys: list[str]
    faults: FaultLog


@torch.no_grad()
def embed_images(
    model: Model,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    progress: bool = False,
) -> ImageFeatures:
    """Image features of every readable sample of `source`; of a classifier its logits, as they are.

    Raises:
        ValueError: no sample at all could be read.
    """
    device = next(model.model.parameters()).device
    loader: DataLoader[dict[str, Any]] = DataLoader(
        EvaluationSamples(source, model.preprocess),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )
    faults = FaultLog()
    found: list[Tensor] = []
    texts: list[tuple[str, ...]] = []
    labels: list[int | None] = []
    keys: list[str] = []
    towers: Any = model.model
    with evaluating(model.model), autocast(device, precision):
        for batch in tqdm(loader, desc="images", unit="batch", disable=not progress, leave=False):
            faults.add(batch["faults"])
            if "image" not in batch:
                continue
            images = batch["image"].to(device)
            if isinstance(towers, Classifier):
                found.append(towers.classify(images).float().cpu())
            else:
                found.append(normalised(towers.encode_image(images)))
            texts += batch["texts"]
            labels += batch["label"]
            keys += batch["key"]
    if not found:
        raise ValueError(f"no sample could be read: {faults.summary()}")
    return ImageFeatures(torch.cat(found), texts, labels, keys, faults)


def embed_texts(
    model: Model, texts: list[str], *, batch_size: int = 256, precision: str = "fp32"
) -> Tensor:
    """Text features, (len(texts), D) float32, normalised."""
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    return torch.cat([features for _, features in text_batches(model, texts, 0, **options)])


@torch.no_grad()
def text_batches(
    model: Model, texts: list[str], start: int, *, batch_size: int, precision: str
) -> Iterator[tuple[int, Tensor]]:
    """(row, normalised features) of the texts from `start` on, in order."""
    device = next(model.model.parameters()).device
    towers: Any = model.model
    with evaluating(model.model), autocast(device, precision):
        for first in range(start, len(texts), batch_size):
            tokens = model.tokenizer(texts[first : first + batch_size]).to(device)
            yield first, normalised(towers.encode_text(tokens))


def normalised(features: Tensor) -> Tensor:
    """Features of length one in float32 on the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()


class evaluating:
    """Evaluation mode inside, the previous mode afterwards."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.training = module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *exception: object) -> None:
        self.module.train(self.training)
