"""`fastclip convert FORMAT SRC OUT`: shards from other formats, checkpoints in and out."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

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
    """Shards of CIFAR-10: captions are class templates, a tenth of the images is held out."""

    source: Source
    """Folder where torchvision unpacked CIFAR-10."""
    target: Target
    """Folder for the shards, classes.txt and templates.txt."""
    seed: int = 0
    """Of the split and the captions."""

    def run(self) -> None:
        for split, counts in convert_cifar10(self.source, self.target, seed=self.seed).items():
            _report(split, counts)


@dataclass(frozen=True)
class Coco(Conversion):
    """Shards of COCO captions: images as they are, with all captions of each."""

    source: Source
    """A captions file, e.g. captions_train2017.json."""
    target: Target
    """Folder for the shards."""
    image_root: str | None = None
    """Folder of the images; by default ../train2017 or the like, or that of the file."""
    per_shard: int = 1000
    """Images in one shard."""

    def run(self) -> None:
        prefix = self.source.stem.removeprefix("captions_")
        _convert_table(open_coco(self.source, DataOptions.of(self)), prefix, self)


@dataclass(frozen=True)
class Csv(Conversion):
    """Shards of a table of image paths and captions: images as they are, all captions of each."""

    source: Source
    """A table in UTF-8 with a header line."""
    target: Target
    """Folder for the shards."""
    csv_img_key: str = "filepath"
    """Column that holds the paths of images."""
    csv_caption_key: str = "title"
    """Column that holds captions; rows with one path are captions of one image."""
    csv_separator: str = "\t"
    """Character between the columns."""
    image_root: str | None = None
    """Folder of the images; by default that of the file."""
    per_shard: int = 1000
    """Images in one shard."""

    def run(self) -> None:
        _convert_table(open_csv(self.source, DataOptions.of(self)), self.source.stem, self)


@dataclass(frozen=True)
class ImagenetCaptions(Conversion):
    """Shards of ImageNet-Captions: photographs as they are, with Flickr texts and classes."""

    source: Source
    """imagenet_captions.json."""
    target: Target
    """Folder for the shards and classes.txt, the WordNet ids in the order of KEY.cls."""
    image_root: Path
    """Folder with the images at WNID/FILENAME, e.g. ILSVRC2012/train, or at FILENAME."""
    caption_parts: str = ",".join(CAPTION_PARTS)
    """What KEY.txt is made of, in this order; KEY.json has it all."""
    per_shard: int = 1000
    """Images in one shard."""

    def run(self) -> None:
        parts = tuple(part.strip() for part in self.caption_parts.split(","))
        counts, faults = convert_imagenet_captions(
            self.source, self.target, self.image_root, parts=parts, per_shard=self.per_shard
        )
        _report(self.source.stem, counts)
        _tell("skipped", faults)


@dataclass(frozen=True)
class Recaption(Conversion):
    """Copy shards, with captions added that an image-to-text model makes.

    The model sees each image with its alt-text (KEY.txt) and the title of its page ("title" in
    KEY.json). The caption goes to the key "recaption" of KEY.json; all else stays as it is. Needs
    the package transformers. For example:

    fastclip convert recaption '/data/{00000..00041}.tar' /data/recaptioned --model
    Salesforce/blip-image-captioning-large

    Stopped or killed, the same command resumes where it was, at most one batch back. Started
    several times, e.g. once a GPU, the processes share the shards. Nothing is ever overwritten.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards as for --train-data of `fastclip train`, e.g. '/data/{00000..00041}.tar'."""
    target: Target
    """Folder for the new shards, which have the names of the old."""
    options: Annotated[CaptionOptions, tyro.conf.arg(name="")]
    """How captions are made."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""

    def run(self) -> None:
        done = recaption_shards(self.source, self.target, self.options, device=self.device)
        print(
            f"{done.captions} captions for {done.samples} samples in {done.shards} shards; "
            f"{done.finished} were there, {done.busy} are being written by other processes",
            file=sys.stderr,
        )
        _tell("without a new caption", done.faults)


@dataclass(frozen=True)
class Corrupt(Conversion):
    """Shards with ImageNet-C's corruptions, one a kind; labels and captions as they are.

    Needs the package imagecorruptions-imaug. For example, for `fastclip eval robustness`:

    fastclip convert corrupt /data/val-00000.tar /data/corrupted --kinds fog snow --severity 3
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards as for --train-data of `fastclip train`."""
    target: Target
    """Folder for KIND-SEVERITY.tar, and classes.txt and templates.txt from beside the shards."""
    kinds: tuple[str, ...] = KINDS
    """Corruptions; by default ImageNet-C's 15; 'all' for its 4 extra ones too."""
    severity: int = 3
    """1 (slight) to 5."""

    def run(self) -> None:
        kinds = (*KINDS, *EXTRA_KINDS) if self.kinds == ("all",) else self.kinds
        counts, faults = corrupt_shards(self.source, self.target, kinds, self.severity)
        for name, count in counts.items():
            _report(name, [count])
        _tell("skipped", faults)


@dataclass(frozen=True)
class ToOpenClip(Conversion):
    """A run's weights as a checkpoint of open_clip's; beside OUT.pt its architecture, OUT.json."""

    source: Source
    """A run directory, whose latest checkpoint is used, or a checkpoint."""
    target: Target
    """The .pt file."""
    trust_checkpoint: bool = False
    """Read a checkpoint of DeepSpeed's: pickles, which can run any code when they are loaded."""

    def run(self) -> None:
        from fastclip.models.convert import export_open_clip

        export_open_clip(self.source, self.target, trust_checkpoint=self.trust_checkpoint)


@dataclass(frozen=True)
class FromOpenClip(Conversion):
    """A run directory, for `fastclip eval` and others, of a checkpoint of open_clip's."""

    source: Source
    """The checkpoint."""
    target: Target
    """Folder for the run."""
    model: str | None = None
    """The checkpoint's architecture; it has to be given."""

    def run(self) -> None:
        from fastclip.models.convert import import_open_clip

        if self.model is None:
            raise ValueError("from-open-clip needs --model, the checkpoint's architecture")
        import_open_clip(self.source, self.model, self.target)


@dataclass(frozen=True)
class ToUniversal(Conversion):
    """A checkpoint of DeepSpeed's in its universal format, for any number of processes."""

    source: Source
    """A run directory, whose latest checkpoint is used, or a checkpoint."""
    target: Target
    """Folder for the universal checkpoint."""
    trust_checkpoint: bool = False
    """Read it: pickles, which can run any code when they are loaded."""

    def run(self) -> None:
        from fastclip.models.convert import export_universal

        export_universal(self.source, self.target, trust_checkpoint=self.trust_checkpoint)


ConvertConfig = (
    Cifar10
    | Coco
    | Csv
    | ImagenetCaptions
    | Recaption
    | Corrupt
    | AroOrder
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
        description="Make webdataset shards of a data set, or carry a checkpoint over. "
        "`fastclip convert FORMAT --help` lists a format's options.",
    )
    config.run()
    print(config.target)
    return 0


def _convert_table(table: ImageFiles, prefix: str, flags: Coco | Csv) -> None:
    counts, faults = convert_table(table, flags.target, prefix, per_shard=flags.per_shard)
    _tell("skipped", faults)
    _report(prefix, counts)


def _report(split: str, counts: list[int]) -> None:
    print(f"{split}: {sum(counts)} samples in {len(counts)} shards", file=sys.stderr)


def _tell(what: str, faults: FaultLog) -> None:
    if faults.counts:
        print(f"{what}: {faults.report()}", file=sys.stderr)
