"""`fastclip data preview [DATA] -o sheet.png`: see what a model will see."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.data.loader import FaultLog
from fastclip.data.options import DataOptions, DatasetType
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
    dataset_type: DatasetType = "auto"
    """What the data are; auto tells by the name."""
    csv_img_key: str = "filepath"
    """Column of a table that holds the paths of images."""
    csv_caption_key: str = "title"
    """Column of a table that holds captions."""
    csv_separator: str = "\t"
    """Character between the columns of a table."""
    image_root: str | None = None
    """Folder of a table's images; by default beside the table."""


def main(arguments: Sequence[str]) -> int:
    """Write the sheet; unreadable samples are passed over and reported."""
    config = tyro.cli(DataConfig, args=list(arguments), prog="fastclip data")
    if config.count < 1:
        raise ValueError(f"--count is {config.count}; give at least 1")
    source = open_source(config.data, DataOptions.of(config), split="train", count=config.count)
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
