"""`fastclip convert FORMAT SRC OUT`: shards from other formats, checkpoints in and out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.cli.convert_models import FromOpenClip, ToHub, ToOnnx, ToOpenClip, ToUniversal
from fastclip.cli.convert_order import AroOrder
from fastclip.command_line import parse_flags
from fastclip.data.convert import convert_cifar10, convert_table
from fastclip.data.corrupt import EXTRA_KINDS, KINDS, corrupt_shards
from fastclip.data.faults import FaultLog
from fastclip.data.files import ImageFiles
from fastclip.data.imagenet_captions import CAPTION_PARTS, convert_imagenet_captions
from fastclip.data.options import DataOptions
from fastclip.data.recaption import CaptionOptions, recaption_shards
from fastclip.data.tables import open_coco, open_csv
from fastclip.messages import counted, logger

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


class Conversion(ABC):
    """A format's flags, which can be carried out."""

    target: Path

    @abstractmethod
    def run(self) -> None:
        """Convert; prints the number of samples a split."""


@dataclass(frozen=True)
class Cifar10(Conversion):
    """CIFAR-10 to shards: captions from class templates; a tenth of the images is held out."""

    source: Source
    """Folder where torchvision unpacked CIFAR-10."""
    target: Target
    """Folder for the shards, classes.txt and templates.txt."""
    seed: int = 0
    """Seed of the split and the captions."""

    def run(self) -> None:
        for split, counts in convert_cifar10(self.source, self.target, seed=self.seed).items():
            _report(split, counts)


@dataclass(frozen=True)
class Coco(Conversion):
    """COCO captions to shards: unchanged images, each with all of its captions."""

    source: Source
    """A captions file, e.g. captions_train2017.json."""
    target: Target
    """Folder for the shards."""
    image_root: str | None = None
    """Folder of the images; by default ../train2017 or similar, or the folder of the file."""
    per_shard: int = 1000
    """Images per shard."""

    def run(self) -> None:
        prefix = self.source.stem.removeprefix("captions_")
        _convert_table(open_coco(self.source, DataOptions.of(self)), prefix, self)


@dataclass(frozen=True)
class Csv(Conversion):
    """A table of image paths and captions to shards: unchanged images, all captions of each."""

    source: Source
    """A table in UTF-8 with a header line."""
    target: Target
    """Folder for the shards."""
    csv_img_key: str = "filepath"
    """Column with the paths of images."""
    csv_caption_key: str = "title"
    """Column with captions; rows with the same path are captions of one image."""
    csv_separator: str = "\t"
    """Character between the columns."""
    image_root: str | None = None
    """Folder of the images; by default the folder of the file."""
    per_shard: int = 1000
    """Images per shard."""

    def run(self) -> None:
        _convert_table(open_csv(self.source, DataOptions.of(self)), self.source.stem, self)


@dataclass(frozen=True)
class ImagenetCaptions(Conversion):
    """ImageNet-Captions to shards: unchanged photographs, with Flickr texts and classes."""

    source: Source
    """imagenet_captions.json."""
    target: Target
    """Folder for the shards and classes.txt, the WordNet ids in the order of KEY.cls."""
    image_root: Path
    """Folder with the images at WNID/FILENAME, e.g. ILSVRC2012/train, or at FILENAME."""
    caption_parts: str = ",".join(CAPTION_PARTS)
    """Parts of KEY.txt, in this order; KEY.json has all of them."""
    per_shard: int = 1000
    """Images per shard."""

    def run(self) -> None:
        parts = tuple(part.strip() for part in self.caption_parts.split(","))
        counts, faults = convert_imagenet_captions(
            self.source, self.target, self.image_root, parts=parts, per_shard=self.per_shard
        )
        _report(self.source.stem, counts)
        _report_faults("skipped", faults)


@dataclass(frozen=True)
class Recaption(Conversion):
    """Copy shards and add captions that an image-to-text model generates.

    The model gets each image with its alt-text (KEY.txt) and the title of its page ("title" in
    KEY.json). The caption is stored under the key "recaption" of KEY.json; everything else is
    copied unchanged. Needs the package transformers. For example:

    fastclip convert recaption '/data/{00000..00041}.tar' /data/recaptioned --model
    Salesforce/blip-image-captioning-large

    After an interruption the same command resumes and repeats at most one batch. Start it several
    times, e.g. once per GPU, and the processes share the shards. Nothing is overwritten.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards as for --train-data of `fastclip train`, e.g. '/data/{00000..00041}.tar'."""
    target: Target
    """Folder for the new shards, which keep their names."""
    options: Annotated[CaptionOptions, tyro.conf.arg(name="")]
    """How captions are made."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""

    def run(self) -> None:
        done = recaption_shards(self.source, self.target, self.options, device=self.device)
        logger.info(
            f"{counted(done.captions, 'caption')} for {counted(done.samples, 'sample')} in "
            f"{counted(done.shards, 'shard')}; {done.finished} were there, {done.busy} are being "
            "written by other processes"
        )
        _report_faults("without a new caption", done.faults)


@dataclass(frozen=True)
class Corrupt(Conversion):
    """Corrupt images as in ImageNet-C, one shard per kind; labels and captions are kept.

    Needs the package imagecorruptions-imaug. For example, for `fastclip eval robustness`:

    fastclip convert corrupt /data/val-00000.tar /data/corrupted --kinds fog snow --severity 3
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards as for --train-data of `fastclip train`."""
    target: Target
    """Folder for KIND-SEVERITY.tar, and copies of the shards' classes.txt and templates.txt."""
    kinds: tuple[str, ...] = KINDS
    """Corruptions; by default the 15 of ImageNet-C; 'all' adds its 4 extra ones."""
    severity: int = 3
    """1 (slight) to 5."""

    def run(self) -> None:
        kinds = (*KINDS, *EXTRA_KINDS) if self.kinds == ("all",) else self.kinds
        counts, faults = corrupt_shards(self.source, self.target, kinds, self.severity)
        for name, count in counts.items():
            _report(name, [count])
        _report_faults("skipped", faults)


ConvertConfig = (
    Cifar10
    | Coco
    | Csv
    | ImagenetCaptions
    | Recaption
    | Corrupt
    | AroOrder
    | ToHub
    | ToOnnx
    | ToOpenClip
    | FromOpenClip
    | ToUniversal
)


def main(arguments: Sequence[str]) -> int:
    """Convert; the last line printed is what was written."""
    config = parse_flags(
        ConvertConfig,
        arguments,
        "fastclip convert",
        description="Make webdataset shards from a data set, or convert a checkpoint. "
        "`fastclip convert FORMAT --help` lists a format's options.",
    )
    config.run()
    print(config.target)
    return 0


def _convert_table(table: ImageFiles, prefix: str, flags: Coco | Csv) -> None:
    counts, faults = convert_table(table, flags.target, prefix, per_shard=flags.per_shard)
    _report_faults("skipped", faults)
    _report(prefix, counts)


def _report(split: str, counts: list[int]) -> None:
    logger.info(f"{split}: {counted(sum(counts), 'sample')} in {counted(len(counts), 'shard')}")


def _report_faults(what: str, faults: FaultLog) -> None:
    if faults.counts:
        logger.warning(f"{what}: {faults.report()}")
