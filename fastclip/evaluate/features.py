"""Normalized features of a data set, in the data's own order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fastclip.data.faults import FaultLog
from fastclip.data.files import read_image_file
from fastclip.data.index import Fault
from fastclip.data.loader import EvaluationSamples, collate, evaluation_loader
from fastclip.data.samples import Source, UnreadableSample, decode_image
from fastclip.data.tokens import bounded
from fastclip.device import autocast
from fastclip.evaluate import sharing
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model

# files in a message
_SHOWN = 3


@dataclass(frozen=True)
class Encoding:
    """How features are computed.

    Args:
        batch_size: images or texts encoded at a time.
        workers: processes that load images; 0 loads in this one.
        precision: the towers' precision, one of `fastclip.device.AUTOCAST_DTYPES`.
        progress: whether to draw a bar.

    Raises:
        ValueError: the batch size is not positive.
    """

    batch_size: int = 256
    workers: int = 0
    precision: str = "fp32"
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; give a positive number")


class ImageFile(NamedTuple):
    """An image on disk, or a part of it.

    box: (left, top, right, bottom) in pixels, cut out before the image is preprocessed.
    """

    path: Path
    box: tuple[int, int, int, int] | None = None


@dataclass
class ImageFeatures:
    """Features of every readable sample and what came with them.

    features: (N, D) float32, normalized; of a classifier its logits. texts (all captions of each
    image), labels and keys have length N.
    """

    features: Tensor
    texts: list[tuple[str, ...]]
    labels: list[int | None]
    keys: list[str]
    faults: FaultLog


def embed_images(
    model: Model,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    progress: bool = False,
    classify: bool = True,
) -> ImageFeatures:
    """Image features of every readable sample of `source`.

    Args:
        batch_size, workers, precision, progress: see `Encoding`.
        classify: of a classifier take its logits, as they are, not the features below them.

    Raises:
        ValueError: no sample at all could be read.
    """
    encoding = Encoding(batch_size, workers, precision, progress)
    samples = EvaluationSamples(source, model.preprocess)
    batches = _encode_images(model, samples, encoding, classify=classify)
    faults = FaultLog()
    for batch in batches:
        faults.add(batch["faults"])
    found = [batch for batch in batches if "features" in batch]
    if not found:
        raise ValueError(f"no sample could be read: {faults.summary()}")
    texts, labels, keys = (
        [value for batch in found for value in batch[name]] for name in ("texts", "label", "key")
    )
    return ImageFeatures(
        torch.cat([batch["features"] for batch in found]), texts, labels, keys, faults
    )


def embed_files(model: Model, files: Sequence[ImageFile], encoding: Encoding) -> Tensor:
    """Image features of files, (len(files), D) float32, normalized; of a classifier its logits.

    Equal files are encoded once.

    Raises:
        ValueError: there are no files, or some are missing or cannot be read; the message names the
            first and how many.
    """
    distinct = {file: row for row, file in enumerate(dict.fromkeys(files))}
    _require_all(len(distinct), [str(f.path) for f in distinct if not f.path.is_file()], "missing")
    batches = _encode_images(model, _Files(list(distinct), model.preprocess), encoding)
    faults = [str(fault) for batch in batches for fault in batch["faults"]]
    _require_all(len(distinct), faults, "unreadable")
    features = torch.cat([batch["features"] for batch in batches])
    return features[[distinct[file] for file in files]]


@torch.no_grad()
def embed_pictures(
    model: Model, pictures: Sequence[Image.Image], *, precision: str = "fp32"
) -> Tensor:
    """Image features of a few images in memory, (len(pictures), D) float32, normalized."""
    device = next(model.model.parameters()).device
    towers: Any = model.model
    pixels = torch.stack([model.preprocess(picture) for picture in pictures]).to(device)
    with evaluating(model.model), autocast(device, precision):
        return normalized(towers.encode_image(pixels))


def _require_all(count: int, bad: list[str], what: str) -> None:
    if bad:
        more = ", ..." if bad[_SHOWN:] else ""
        raise ValueError(
            f"{len(bad)} of {count} image files are {what}: {', '.join(bad[:_SHOWN])}{more}; "
            "a score without them would not compare with published ones; restore them"
        )
    if not count:
        raise ValueError("there are no image files to encode")


class _Files(Dataset[dict[str, Any]]):
    """Image files as `EvaluationSamples` gives samples; unreadable ones carry only their fault."""

    def __init__(self, files: list[ImageFile], preprocess: Any) -> None:
        self.files = files
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> dict[str, Any]:
        path, box = self.files[position]
        try:
            image = decode_image(read_image_file(path, str(path)), str(path))
            if box is not None:
                left, top, right, bottom = box
                if not (left < right and top < bottom):
                    raise UnreadableSample(Fault("box without area", str(path), str(box)))
                image = image.crop(box)
        except UnreadableSample as error:
            return {"faults": [error.fault]}
        except OSError as error:
            return {"faults": [Fault("file not readable", str(path), str(error))]}
        return {"image": self.preprocess(image), "key": position, "faults": []}


@torch.no_grad()
def _encode_images(
    model: Model, samples: Dataset[dict[str, Any]], encoding: Encoding, *, classify: bool = True
) -> list[dict[str, Any]]:
    """The batches that `collate` makes of all samples in order, with "features" for "image".

    Ranks share whole batches, so that the features are bitwise equal to one process's.
    """
    device = next(model.model.parameters()).device
    rows = list(range(len(samples)))  # type: ignore[arg-type]
    size = encoding.batch_size
    loader = evaluation_loader(
        samples,
        encoding.workers,
        batch_sampler=sharing.deal([rows[i : i + size] for i in range(0, len(rows), size)]),
        collate_fn=collate,
    )
    towers: Any = model.model
    silent = not (encoding.progress and sharing.is_first())
    encoded: list[dict[str, Any]] = []
    with evaluating(model.model), autocast(device, encoding.precision):
        for batch in tqdm(loader, desc="images", unit="batch", disable=silent, leave=False):
            if "image" in batch:
                images = batch.pop("image").to(device)
                batch["features"] = (
                    towers.classify(images).float().cpu()
                    if classify and isinstance(towers, Classifier)
                    else normalized(towers.encode_image(images))
                )
            encoded.append(batch)
    return sharing.collect(encoded)


def embed_texts(
    model: Model, texts: list[str], *, batch_size: int = 256, precision: str = "fp32"
) -> Tensor:
    """Text features, (len(texts), D) float32, normalized."""
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    share = [
        features
        for batch in sharing.deal(batches)
        for _, features in text_batches(model, batch, 0, **options)
    ]
    return torch.cat(sharing.collect(share))


@torch.no_grad()
def text_batches(
    model: Model, texts: list[str], start: int, *, batch_size: int, precision: str
) -> Iterator[tuple[int, Tensor]]:
    """(row, normalized features) of the texts from `start` on, in order."""
    device = next(model.model.parameters()).device
    towers: Any = model.model
    with evaluating(model.model), autocast(device, precision):
        tokenizer = bounded(model.tokenizer)
        for first in range(start, len(texts), batch_size):
            tokens = tokenizer(texts[first : first + batch_size]).to(device)
            yield first, normalized(towers.encode_text(tokens))


def normalized(features: Tensor) -> Tensor:
    """Features of length one in float32 on the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()


def require_finite(features: Tensor, keys: list[str]) -> None:
    """Refuse features that are not: a row of NaN would say that the image is unreadable.

    Args:
        features: (N, D).
        keys: of the samples.

    Raises:
        ValueError: with the first key whose features are not finite.
    """
    for key, finite in zip(keys, features.isfinite().all(dim=1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"the model's features of {key} are not finite: its weights are broken, or too "
                "large for --precision"
            )


class evaluating:
    """Evaluation mode inside, afterwards every submodule's previous mode."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.training = {part: part.training for part in module.modules()}

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *exception: object) -> None:
        for part, training in self.training.items():
            part.training = training
