"""`fastclip search TEXT ... --data DATA --model MODEL`: images found by texts, or by images."""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from fastclip.cli.model_flags import ModelFlags
from fastclip.command_line import parse_flags
from fastclip.data.files import read_image_file
from fastclip.data.options import DataOptions
from fastclip.data.order import Order
from fastclip.data.regular import digest_of
from fastclip.data.samples import Sample, Source, UnreadableSample, decode_image
from fastclip.data.sources import open_source
from fastclip.device import choose_device
from fastclip.evaluate.features import Encoding, embed_pictures, embed_texts
from fastclip.evaluate.gallery import Found, require_replaceable, results_sheet, save_sheet
from fastclip.evaluate.kept import KeptFeatures, keep_features
from fastclip.evaluate.search import search
from fastclip.evaluate.wds import expand_wds
from fastclip.messages import logger
from fastclip.models.clip import Model
from fastclip.models.image_tower import ImageSystem
from fastclip.printable import printable

DEFAULT_TOP = 8
# of one picture: more would be a file that nothing opens
MOST_DRAWN = 2000
_WIDTH, _KEY = 80, 30
"""Columns of a line, and of them those of an image's name at most."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ModelFlags):
    """Find images by texts or by other images: a table of scores, and a picture.

    The features of the images are computed once and kept. They are computed again if the images,
    the model or its preprocessing have changed.
    """

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to look for; each text is a row of the picture."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """An image to look for, a JPEG, PNG or WebP file; for several give it again."""
    data: str = "scenes"
    """The images that are searched: as --train-data of `fastclip train`, or a folder of images; no
    captions are needed."""
    top: int | None = None
    """Number of images for each query; by default 8."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("search.png")
    """PNG file to write; a file that is not of this command's is never replaced."""
    features: Path | None = None
    """Folder for the features; by default search in the run directory or, for other models,
    ./search/MODEL_PRETRAINED."""
    size: int = 128
    """Side of an image in the picture, in pixels."""
    batch_size: int = 256
    """Images per batch."""
    workers: int = 2
    """Processes that load images."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """Precision of the towers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    split: str = "test"
    """Split, for a folder in CLIP_benchmark's layout."""
    num_samples: int = 1000
    """Number of scenes, collages or synthetic images; other data are read whole."""
    options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    """How the data are read."""

    @property
    def encoding(self) -> Encoding:
        """How features are computed."""
        return Encoding(self.batch_size, self.workers, self.precision, sys.stderr.isatty())

    @property
    def file(self) -> Path:
        """Where the features are kept: a file for each model and data."""
        folder = self.features or self.folder("search")
        name = Path(self.data.partition("::")[0]).name.partition(".")[0][:40]
        readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        parts = (self.model, self.pretrained, self.average, self.head_weight, self.precision)
        asked = digest_of([*parts, self.data, self.split, self.num_samples, self.options])
        return folder / f"{readable or 'images'}-{asked[:8]}.npy"


def main(arguments: Sequence[str]) -> int:
    """Search; prints a table a query, and the name of the picture."""
    config: SearchConfig = parse_flags(SearchConfig, arguments, "fastclip search")
    _check(config)
    require_replaceable(config.output)
    # before the model, which takes longer to load
    pictures = [_read_image(path) for path in config.image]
    source = open_source(
        expand_wds(config.data, config.split),
        config.options,
        split="val",
        count=config.num_samples,
        required=(),
        optional_texts=True,
    )
    count = sum(source.counts)
    _require_enough(config, count)
    model = config.open(choose_device(config.device))
    if config.texts and isinstance(model.model, ImageSystem):
        raise ValueError(
            f"{config.model} was trained without language: look for images with --image FILE"
        )
    kept = keep_features(model, source, config.file, config.encoding, name=_named(config))
    _require_enough(config, kept.readable)
    results = _results(config, model, source, kept, pictures)
    names = [*config.texts, *map(str, config.image)]
    for name, found in zip(names, results, strict=True):
        print("\n".join(table(name, found)), end="\n\n")
    rows = [
        [
            Found(sample.image, score, name in sample.texts, next(iter(sample.texts), ""))
            for score, sample in found
        ]
        for name, found in zip(names, results, strict=True)
    ]
    save_sheet(config.output, results_sheet([*config.texts, *pictures], rows, config.size))
    print(config.output)
    return 0


def table(query: str, found: Sequence[tuple[float, Sample]]) -> list[str]:
    """A query and the lines of what it has found: place, score, name and first caption.

    Args:
        query: as it was given.
        found: (score, sample), the best first.
    """
    keys = [cut(sample.key, _KEY, keep_end=True) for _, sample in found]
    column = max([_columns(key) for key in keys], default=0)
    named = "  caption" if any(sample.texts for _, sample in found) else ""
    lines = [cut(query, _WIDTH), f"{'':4}{'score':>7}  {'image':{column}}{named}".rstrip()]
    for place, ((score, sample), key) in enumerate(zip(found, keys, strict=True), 1):
        blank = " " * (column - _columns(key))
        caption = cut(next(iter(sample.texts), ""), _WIDTH - column - 15)
        lines.append(f"{place:4}{score:7.3f}  {key}{blank}  {caption}".rstrip())
    return lines


def cut(text: str, columns: int, *, keep_end: bool = False) -> str:
    """A text of unknown origin on one line, at most so many columns of a terminal wide.

    Args:
        text: line breaks in it become blanks.
        columns: at least 3.
        keep_end: whether its beginning is cut off, not its end.
    """
    line = printable(" ".join(text.split()))
    if _columns(line) <= columns:
        return line
    letters = reversed(line) if keep_end else iter(line)
    room = accumulate(map(_width, letters))
    kept = sum(1 for _ in takewhile(lambda taken: taken <= columns - 3, room))
    return f"...{line[len(line) - kept :]}" if keep_end else f"{line[:kept]}..."


def _columns(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(map(_width, text))


def _width(letter: str) -> int:
    """Letters of East Asian scripts are two columns wide."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _check(config: SearchConfig) -> None:
    if not config.texts and not config.image:
        raise ValueError("there is nothing to look for; give a text, or --image FILE")
    if not all(map(str.strip, config.texts)):
        raise ValueError("a text to look for is empty; leave it out")
    if config.top is not None and config.top < 1:
        raise ValueError(f"--top is {config.top}; give at least 1")
    if not 16 <= config.size <= 1024:
        raise ValueError(f"--size is {config.size}; give a number of pixels from 16 to 1024")
    queries, top = len(config.texts) + len(config.image), config.top or DEFAULT_TOP
    if queries * top > MOST_DRAWN:
        raise ValueError(
            f"{queries} queries with --top {top} are {queries * top:,} images, and a picture "
            f"has at most {MOST_DRAWN:,}; lower --top or give fewer queries"
        )


def _require_enough(config: SearchConfig, count: int) -> None:
    if config.top is not None and config.top > count:
        raise ValueError(
            f"--top is {config.top}, and {config.data} has {count} readable images; give at most "
            f"{count}"
        )


def _named(config: SearchConfig) -> str:
    """What the model is called in what describes its features."""
    parts = [config.model, config.pretrained, "average" if config.average else None]
    return " ".join(filter(None, parts))


def _read_image(path: Path) -> Image.Image:
    try:
        return decode_image(read_image_file(path, str(path)), str(path))
    except UnreadableSample as error:
        raise ValueError(f"--image cannot be used: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--image {path} does not exist") from error


def _results(
    config: SearchConfig,
    model: Model,
    source: Source,
    kept: KeptFeatures,
    pictures: list[Image.Image],
) -> list[list[tuple[float, Sample]]]:
    """What each query has found, (score, sample), the best first."""
    asked = []
    if config.texts:
        asked.append(embed_texts(model, list(config.texts), precision=config.precision))
    if pictures:
        asked.append(embed_pictures(model, pictures, precision=config.precision))
    top = config.top or min(DEFAULT_TOP, kept.readable)
    scores, rows = search(kept.features, torch.cat(asked), top)
    order = Order(source.counts, seed=0, window=0)
    try:
        samples = {row: source.read(*order.locate(0, row)) for row in set(rows.flatten().tolist())}
    except UnreadableSample as error:
        raise ValueError(f"an image was found and cannot be read any more: {error}") from error
    for fault in source.drain_faults():
        logger.warning(str(fault))
    return [
        [(score, samples[row]) for score, row in zip(*best, strict=True)]
        for best in zip(scores.tolist(), rows.tolist(), strict=True)
    ]
