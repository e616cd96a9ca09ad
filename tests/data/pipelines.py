"""The two pipelines over one shard, for tests of what they have in common."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastclip.data.augment import Augmentation
from fastclip.data.dali import DaliLoader
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.shards import ShardSource
from fastclip.data.training_samples import TrainingSamples
from tests.conftest import write_tar

BACKENDS = ("cpu", "dali")


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(text.encode())] for text in texts])


def smooth_image(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """Noise as smooth as a photograph."""
    stream = np.random.default_rng(seed)
    coarse = Image.fromarray(stream.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photograph_shard(path: Path, real_data: Path) -> Path:
    """The photographs of coco_mini's two folders as one shard."""
    members = []
    for number, photo in enumerate(sorted((real_data / "coco_mini").glob("*2017/*.jpg"))):
        members.append((f"{number:05d}.jpg", photo.read_bytes()))
        members.append((f"{number:05d}.txt", f"photograph {number}".encode()))
    return write_tar(path, members)


def build_loader(
    backend: str,
    pattern: str,
    views: tuple[Augmentation, ...],
    batch_size: int,
    *,
    seed: int = 0,
    **options: Any,
) -> TrainingLoader:
    source = ShardSource(pattern)
    order = Order(source.counts, seed, window=64)
    dali = backend == "dali"
    samples = TrainingSamples(source, order, views, tokenize, pixels=not dali)
    return (DaliLoader if dali else TrainingLoader)(samples, batch_size, **options)
