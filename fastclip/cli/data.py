"""`fastclip data preview [DATA] -o sheet.png`: see what a model will see."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from fastclip.atomic import writing
from fastclip.command_line import parse_flags
from fastclip.data.augment import Augmentation
from fastclip.data.captions import CaptionSampling
from fastclip.data.faults import FaultLog
from fastclip.data.options import DataOptions
from fastclip.data.order import Order
from fastclip.data.preview import contact_sheet
from fastclip.data.samples import Source, UnreadableSample
from fastclip.data.sources import open_source
from fastclip.data.training_samples import TrainingSamples
from fastclip.messages import logger


@dataclass(frozen=True)
class DataConfig:
    """Look at data before training on it."""

    action: Annotated[Literal["preview"], tyro.conf.Positional]
    """preview: write a contact sheet of images with their captions."""
    data: Annotated[str, tyro.conf.Positional] = "scenes"
    """As --train-data of `fastclip train`, e.g. 'scenes:caption=dense,shift=style'."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("preview.png")
    """PNG file to write."""
    count: int = 24
    """Number of images, in the order of an epoch with --seed."""
    columns: int = 6
    """Images per row."""
    size: int = 160
    """Side of an image, in pixels."""
    augment: Literal["none", "weak", "strong"] = "none"
    """Show what training sees: views as with its --augment, and sampled captions."""
    hard_negatives: int = 0
    """With --augment, the number of false captions per sample: from the list hard_negatives of
    KEY.json, or else made from the caption."""
    seed: int = 0
    """Seed of the order."""
    options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    """How the data are read."""


def main(arguments: Sequence[str]) -> int:
    """Write the sheet; unreadable samples are skipped and reported."""
    config = parse_flags(DataConfig, arguments, "fastclip data")
    if config.count < 1:
        raise ValueError(f"--count is {config.count}; give at least 1")
    kind = Image.registered_extensions().get(config.output.suffix.lower())
    if kind is None:
        raise ValueError(f"--output {config.output} must end in .png")
    source = open_source(
        config.data,
        config.options,
        split="train",
        count=config.count,
        negatives=config.hard_negatives > 0,
    )
    order = Order(source.counts, config.seed)
    faults = FaultLog()
    shown = _originals if config.augment == "none" else _views
    images, captions = shown(config, source, order, faults)
    for place in faults.places():
        logger.warning(f"skipped {place}")
    if not images:
        raise ValueError(f"no sample of {config.data} could be read: {faults.summary()}")
    sheet = contact_sheet(images, captions, config.columns, config.size)
    with writing(config.output, named=True) as file:
        sheet.save(file, kind)
    print(config.output)
    return 0


def _originals(
    config: DataConfig, source: Source, order: Order, faults: FaultLog
) -> tuple[list[Image.Image], list[str]]:
    images, captions = [], []
    for position in range(min(config.count, len(order))):
        try:
            sample = source.read(*order.locate(0, position))
        except UnreadableSample as error:
            faults.add([error.fault])
            continue
        finally:
            faults.add(source.drain_faults())
        images.append(sample.image)
        captions.append("\n".join(sample.texts))
    return images, captions


def _views(
    config: DataConfig, source: Source, order: Order, faults: FaultLog
) -> tuple[list[Image.Image], list[str]]:
    view = Augmentation.weak(224) if config.augment == "weak" else Augmentation.strong(224)
    weights = tuple(config.options.caption_weights.items())
    drawing = CaptionSampling(weights, negatives=config.hard_negatives)
    # only the pixels and the texts are looked at
    samples = TrainingSamples(
        source, order, view, lambda texts: torch.zeros(len(texts), 1), drawing
    )
    images, captions = [], []
    for position in range(min(config.count, len(order))):
        sample = samples[0, position]
        faults.add(sample["faults"])
        images.append(Image.fromarray(sample["images"][0].permute(1, 2, 0).numpy()))
        captions.append("\nnot: ".join([*sample["captions"], *sample.get("false_captions", ())]))
    return images, captions
