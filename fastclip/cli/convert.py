"""`fastclip convert FORMAT SRC OUT`: shards from other formats, checkpoints in and out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.data.convert import convert_cifar10, convert_table
from fastclip.data.options import DataOptions
from fastclip.data.tables import open_coco, open_csv
from fastclip.models.convert import export_open_clip, export_universal, import_open_clip


@dataclass(frozen=True)
class ConvertConfig:
    """Make webdataset shards from a data set on disk, or carry a checkpoint over."""

    format: Annotated[
        Literal["cifar10", "coco", "csv", "to-open-clip", "from-open-clip", "to-universal"],
        tyro.conf.Positional,
    ]
    """cifar10: torchvision's CIFAR-10; captions are class templates, 5,000 images held out.
    coco: a COCO captions file, e.g. captions_train2017.json. csv: a table of paths and captions.
    The last two keep images as they are and all captions of each.
    to-open-clip: a run's weights as a checkpoint of open_clip's. from-open-clip: the reverse, with
    --model. to-universal: a checkpoint of DeepSpeed's in its universal format."""
    source: Annotated[Path, tyro.conf.Positional]
    """Where the data set or the checkpoint lies."""
    target: Annotated[Path, tyro.conf.Positional]
    """Folder for the shards, the run or the universal checkpoint; the .pt file of to-open-clip."""
    model: str | None = None
    """Architecture of a checkpoint that from-open-clip reads."""
    trust_checkpoint: bool = False
    """Read DeepSpeed's checkpoints: pickles, which can run any code when they are loaded."""
    seed: int = 0
    """Of CIFAR-10's split and captions."""
    image_root: str | None = None
    """Folder of the images of coco and csv; by default ../train2017 or the like for coco, and
    beside the file."""
    csv_img_key: str = "filepath"
    """Column that holds the paths of images."""
    csv_caption_key: str = "title"
    """Column that holds captions; rows with one path are captions of one image."""
    csv_separator: str = "\t"
    """Character between the columns."""
    per_shard: int = 1000
    """Images of coco or csv in one shard."""


def main(arguments: Sequence[str]) -> int:
    """Convert; prints the number of samples a split."""
    config = tyro.cli(ConvertConfig, args=list(arguments), prog="fastclip convert")
    if config.format in ("to-open-clip", "to-universal"):
        export = export_open_clip if config.format == "to-open-clip" else export_universal
        export(config.source, config.target, trust_checkpoint=config.trust_checkpoint)
        print(config.target)
        return 0
    if config.format == "from-open-clip":
        if config.model is None:
            raise ValueError("from-open-clip needs --model, the checkpoint's architecture")
        import_open_clip(config.source, config.model, config.target)
        print(config.target)
        return 0
    if config.format == "cifar10":
        written = convert_cifar10(config.source, config.target, seed=config.seed)
    else:
        table = (open_coco if config.format == "coco" else open_csv)(
            config.source, DataOptions.of(config)
        )
        prefix = config.source.stem.removeprefix("captions_")
        counts, faults = convert_table(table, config.target, prefix, per_shard=config.per_shard)
        written = {prefix: counts}
        if faults.counts:
            print(f"skipped: {faults.report()}", file=sys.stderr)
    for split, counts in written.items():
        print(f"{split}: {sum(counts)} samples in {len(counts)} shards", file=sys.stderr)
    print(config.target)
    return 0
