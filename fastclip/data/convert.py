"""Making webdataset shards from other formats."""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from fastclip.data.files import ImageFiles
from fastclip.data.loader import FaultLog
from fastclip.data.order import hash64, permutation
from fastclip.data.samples import Sample, UnreadableSample, open_image

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

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_shards(samples: Iterable[Sample], folder: Path, prefix: str, per_shard: int) -> list[int]:
    """Write `PREFIX-00000.tar`, ... with KEY.jpg, KEY.txt and KEY.cls; returns the sample counts.

    Args:
        samples: written in the order given; a label of None leaves KEY.cls out. One that carries
            its `encoded` image keeps it as it is, and all of its captions in KEY.json.
        folder: made if needed; `sizes.json` in it gets an entry a shard.
        per_shard: most samples in one shard.

    Raises:
        FileExistsError: a shard of that name is there already; nothing is overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: list[int] = []
    waiting = iter(samples)
    while first := next(waiting, None):
        path = folder / f"{prefix}-{len(counts):05d}.tar"
        counts.append(0)
        with tarfile.open(path, "x", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chain([first], islice(waiting, per_shard - 1)):
                _add_sample(tar, sample)
                counts[-1] += 1
    sizes = _read_sizes(folder)
    sizes |= {f"{prefix}-{i:05d}.tar": count for i, count in enumerate(counts)}
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    return counts


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
            f"{source} holds no whole CIFAR-10; torchvision.datasets.CIFAR10({str(source)!r}, "
            "download=True) fetches it"
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
    (target / "classes.txt").write_text("\n".join(classes) + "\n")
    (target / "templates.txt").write_text("\n".join(CIFAR10_TEMPLATES) + "\n")
    return written


def convert_table(
    source: ImageFiles, target: Path, prefix: str, *, per_shard: int = 1000
) -> tuple[list[int], FaultLog]:
    """Write a table's images, byte for byte, with all of their captions.

    Keys are the row's number and the image's name, so that they differ.

    Returns:
        Samples in each shard, and the images that were left out because they cannot be read.

    Raises:
        ValueError: per_shard is less than 1, or no image at all can be read.
        FileExistsError: the target has such shards.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard is {per_shard}; give at least 1")
    faults = FaultLog()
    counts = write_shards(_encoded_samples(source, faults), target, prefix, per_shard)
    if not counts:
        raise ValueError(f"no image of {source.name} can be read: {faults.summary()}")
    return counts, faults


def _encoded_samples(source: ImageFiles, faults: FaultLog) -> Iterator[Sample]:
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
        yield Sample(f"{number:08d}_{name}", image, source.texts_of(number), encoded=encoded)


def _read_sizes(folder: Path) -> dict[str, int]:
    path = folder / "sizes.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    if sample.encoded is None:
        jpeg = io.BytesIO()
        sample.image.convert("RGB").save(jpeg, "JPEG", quality=95)
        parts = {"jpg": jpeg.getvalue(), "txt": sample.texts[0].encode()}
    else:
        extension = EXTENSIONS[sample.image.format or "JPEG"]
        captions = json.dumps({"captions": sample.texts}, ensure_ascii=False)
        parts = {extension: sample.encoded, "txt": sample.texts[0].encode()}
        parts["json"] = captions.encode()
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    for extension, content in parts.items():
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
