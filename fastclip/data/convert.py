"""Making webdataset shards from other formats."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text
from fastclip.data.faults import FaultLog
from fastclip.data.files import ImageFiles
from fastclip.data.order import hash64, permutation
from fastclip.data.samples import (
    Sample,
    UnreadableSample,
    open_image,
)
from fastclip.data.writing import DetailedSample, write_shards

# The prompts that CLIP's authors used for CIFAR-10, one drawn for each image's caption.
CIFAR10_TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a low contrast photo of a {}.",
    "a high contrast photo of a {}.",
    "a bad photo of a {}.",
    "a good photo of a {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
)
CIFAR10_VALIDATION = 5000


def cifar10_samples(source: Path, split: str, *, seed: int = 0) -> Iterator[Sample]:
    """CIFAR-10's training photographs with templated captions, in a fixed shuffled order.

    Args:
        source: the folder that holds `cifar-10-batches-py`, as torchvision unpacks it.
        split: "train" (45,000) or "val" (the 5,000 held out of the 50,000).
        seed: of the split, the order and the choice of templates.

    Raises:
        FileNotFoundError: the data set is not there, or not whole.
    """
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(source), train=True, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{source} does not hold all of CIFAR-10; fetch it with "
            f"torchvision.datasets.CIFAR10({str(source)!r}, download=True)"
        ) from error
    order = permutation(len(data), hash64(seed))
    held_out = min(CIFAR10_VALIDATION, len(data) // 10)
    chosen = order[-held_out:] if split == "val" else order[:-held_out]
    for number, index in enumerate(chosen.tolist()):
        image, label = data[index]
        template = CIFAR10_TEMPLATES[hash64(seed, index) % len(CIFAR10_TEMPLATES)]
        yield Sample(f"{number:06d}", image, (template.format(data.classes[label]),), label)


def convert_cifar10(source: Path, target: Path, *, seed: int = 0) -> dict[str, list[int]]:
    """Write CIFAR-10 as `train-*.tar` and `val-*.tar` with classes.txt and templates.txt.

    Returns:
        Samples in each shard, by split.

    Raises:
        FileNotFoundError: the source is not there. FileExistsError: the target has such shards.
    """
    from torchvision.datasets import CIFAR10

    written = {
        split: write_shards(cifar10_samples(source, split, seed=seed), target, split, 9000)
        for split in ("train", "val")
    }
    classes = CIFAR10(str(source), train=True, download=False).classes
    write_text(target / "classes.txt", "\n".join(classes) + "\n")
    write_text(target / "templates.txt", "\n".join(CIFAR10_TEMPLATES) + "\n")
    return written


def convert_table(
    source: ImageFiles,
    target: Path,
    prefix: str,
    *,
    per_shard: int = 1000,
    details_of: Callable[[int], dict[str, Any]] | None = None,
) -> tuple[list[int], FaultLog]:
    """Write a table's images, byte for byte, with all of their captions and their labels.

    Keys are the row's number and the image's name, so that they differ.

    Args:
        details_of: what a row's KEY.json is to hold in place of the list of its captions.

    Returns:
        Samples in each shard, and what was left out: rows that the source found fault with, and
        images whose header cannot be read.

    Raises:
        ValueError: per_shard is less than 1, or no image at all can be read.
        FileExistsError: the target has such shards.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard is {per_shard}; give at least 1")
    faults = FaultLog()
    faults.add(source.drain_faults())
    samples = _encoded_samples(source, faults, details_of)
    counts = write_shards(samples, target, prefix, per_shard)
    if not counts:
        raise ValueError(f"no image of {source.name} can be read: {faults.summary()}")
    return counts, faults


def _encoded_samples(
    source: ImageFiles, faults: FaultLog, details_of: Callable[[int], dict[str, Any]] | None
) -> Iterator[Sample]:
    for number in range(source.count):
        path = source.path_of(number)
        try:
            encoded = source.read_bytes(number)
            image = open_image(encoded, f"{source.name}:{path}")
        except UnreadableSample as error:
            faults.add([error.fault])
            continue
        # a key ends at its first dot, and USTAR takes names of 100 bytes
        name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(path).stem)[:60]
        sample = DetailedSample(f"{number:08d}_{name}", image, source.texts_of(number))
        sample.encoded, sample.label = encoded, source.label_of(number)
        sample.details = details_of(number) if details_of else None
        yield sample
