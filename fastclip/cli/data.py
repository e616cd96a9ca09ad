"""`fastclip data preview [DATA] -o sheet.png`: see what a model will see."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.data.loader import FaultLog
from fastclip.data.options import DataOptions
from fastclip.data.order import Order
from fastclip.data.preview import contact_sheet
from fastclip.data.samples import UnreadableSample
from fastclip.data.sources import open_source


@dataclass(frozen=True)
class DataConfig:
    """Look at data before training on it."""

    action: Annotated[Literal["preview"], tyro.conf.Positional]
    """preview: write a contact sheet of images with their captions."""
    data: Annotated[str, tyro.conf.Positional] = "scenes"
    """As --train-data of `fastclip train`, e.g. 'scenes:caption=dense,shift=style'."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("preview.png")
    """The PNG to write."""
    count: int = 24
    """Images to show, in the order of an epoch with this seed."""
    columns: int = 6
    """Images in a row."""
    size: int = 160
    """Side of an image, in pixels."""
    seed: int = 0
    """Of the order."""
    options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    """How the data are read."""


def main(arguments: Sequence[str]) -> int:
    """Write the sheet; unreadable samples are passed over and reported."""
    config = tyro.cli(DataConfig, args=list(arguments), prog="fastclip data")
    if config.count < 1:
        raise ValueError(f"--count is {config.count}; give at least 1")
    source = open_source(config.data, config.options, split="train", count=config.count)
    order = Order(source.counts, config.seed)
    faults = FaultLog()
    images, captions = [], []
    for position in range(min(config.count, len(order))):
        try:
            sample = source.read(*order.locate(0, position))
        except UnreadableSample as error:
            faults.add([error.fault])
            continue
        images.append(sample.image)
        captions.append("\n".join(sample.texts))
    for place in faults.places():
        print(f"skipped {place}", file=sys.stderr)
    contact_sheet(images, captions, config.columns, config.size).save(config.output)
    print(config.output)
    return 0
