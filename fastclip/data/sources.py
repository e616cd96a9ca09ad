"""Opening what `--train-data`, `--val-data` and `--data` name."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from fastclip.data.collages.photos import Photographs, short_names
from fastclip.data.collages.source import PHOTOS_KEY, CollageSource
from fastclip.data.folders import (
    FolderSource,
    TreeSource,
    class_names,
    has_classes_alone,
    holds_image_folders,
)
from fastclip.data.generated import SyntheticSource, World
from fastclip.data.index import Fault
from fastclip.data.options import DataOptions, DatasetType
from fastclip.data.regular import digest_of
from fastclip.data.remote import ShardCache, is_remote
from fastclip.data.samples import Sample, Source
from fastclip.data.scenes.source import SceneSource
from fastclip.data.scenes.world import SHAPES
from fastclip.data.shards import ShardSource, expand_shards, refuse_commands
from fastclip.data.tables import open_coco, open_csv
from fastclip.data.templates import CLASS_FILES, read_beside, read_lines

__all__ = [
    "CollageSource",
    "Mixture",
    "SceneSource",
    "collage_classes",
    "guess_type",
    "open_photographs",
    "open_source",
    "shard_weights",
]

WORLDS: dict[DatasetType, type[World]] = {"scenes": SceneSource, "collages": CollageSource}
DRAWN = {"train": 20_000, "val": 1000}
SYNTHETIC = 1000

ENDINGS: dict[str, DatasetType] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), "csv"),
    ".json": "coco",
}


class Mixture:
    """Several sources one after another.

    Args:
        sources: they; their shards are numbered on.

    Examples:
        >>> from fastclip.data.sources import Mixture, SceneSource
        >>> mixture = Mixture([SceneSource("train", 100), SceneSource("val", 20)])
        >>> mixture.counts
        (100, 20)
        >>> mixture.read(1, 7).key  # of the second
        'val00000007'
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.counts = tuple(count for source in sources for count in source.counts)
        self.parts = tuple(len(source.counts) for source in sources)
        self._starts = np.cumsum((0, *self.parts))

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """A sample, as the source it belongs to reads it.

        Args:
            shard: number of the shard, counted through all sources.
            index: of the sample in the shard.
            pixels: whether its image is decoded.
        """
        source, shard = self._find(shard)
        return source.read(shard, index, pixels=pixels)

    def place(self, shard: int) -> str:
        """The name of the table or folder that a shard is part of.

        Args:
            shard: its number, counted through all sources.
        """
        source, shard = self._find(shard)
        return source.place(shard)

    def drain_faults(self) -> list[Fault]:
        """The faults of all."""
        return [fault for source in self.sources for fault in source.drain_faults()]

    def digest(self) -> str:
        """Of all, in their order."""
        return digest_of(source.digest() for source in self.sources)

    def _find(self, shard: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._starts, shard, side="right")) - 1
        return self.sources[number], shard - int(self._starts[number])


class FirstSamples:
    """A source's first samples alone.

    Args:
        source: of any kind.
        number: how many; all where it has fewer.
    """

    def __init__(self, source: Source, number: int) -> None:
        self.parts = source.parts
        starts = (0, *accumulate(source.counts))
        self.counts = tuple(
            min(count, max(0, number - start))
            for start, count in zip(starts, source.counts, strict=False)
        )
        self.read, self.place = source.read, source.place
        self.drain_faults = source.drain_faults
        self._source = source

    def digest(self) -> str:
        """Of the source, and of how many of its samples there are."""
        return digest_of([self._source.digest(), self.counts])


def guess_type(data: str) -> DatasetType | None:
    """What the text of `data`, or the folder it names, says it is; None where neither does.

    Args:
        data: shards, a table, a folder, "scenes", ..., in the form of `--train-data`.

    Returns:
        "webdataset", "csv", "coco", "imagefolder", "synthetic", "scenes", "collages" or None.

    Raises:
        ValueError: patterns joined by '::' are of different types.

    Examples:
        >>> from fastclip.data.sources import guess_type
        >>> guess_type("shards/{00000..00041}.tar"), guess_type("captions.tsv")
        ('webdataset', 'csv')
    """
    kinds = {part: _guess_part(part) for part in data.split("::")}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{part!r} is {kind or 'unknown'}" for part, kind in kinds.items())
        raise ValueError(f"data joined by '::' must be of one type, but {found}")
    return next(iter(kinds.values()))


def open_source(
    data: str,
    options: DataOptions | None = None,
    *,
    split: str,
    count: int | None = None,
    required: tuple[str, ...] = ("txt",),
    negatives: bool = False,
    optional_texts: bool = False,
    features: bool = False,
    by_row: bool = False,
) -> Source:
    """The samples that `data` names.

    Args:
        data: shards ("FOLDER/{00000..00041}.tar", a list of them, URLs), a CSV or COCO file, an
            ImageFolder, "synthetic", "scenes" or "scenes:KEY=VALUE,...", "collages" or
            "collages:KEY=VALUE,..."; several of one type joined by '::'.
        options: how to read it; None for the defaults.
        split: which scenes, collages or noise, where `data` does not say.
        count: how many scenes, collages or noise images; of no meaning for the others.
        required: extensions a shard's sample must have besides an image. With none at all a folder
            may hold images anywhere, without folders of classes.
        negatives: have the hard negatives of scenes or collages made, which takes time.
        optional_texts: read captions of shards where there are some, although none are required.
        features: read a teacher's features, which shards alone can hold.
        by_row: whether files elsewhere have a row for each sample; see `ShardSource`.

    Returns:
        A source: `counts` has the number of samples of each shard, `read(shard, index)` gives one,
        with its `image`, `texts` and `label`.

    Raises:
        ValueError, FileNotFoundError: the data cannot be recognized or read; the message says why.

    Examples:
        >>> from fastclip.data.sources import open_source
        >>> source = open_source("scenes:objects=1", split="val", count=100)
        >>> source.counts, source.read(0, 7).image.size
        ((100,), (64, 64))
    """
    options = options or DataOptions()
    refuse_commands(data)
    kind = guess_type(data) if options.dataset_type == "auto" else options.dataset_type
    if kind is None and not required and all(map(_is_folder, data.split("::"))):
        kind = "imagefolder"
    if kind is None or (kind == "webdataset" and os.path.isdir(data)):
        raise ValueError(_unrecognized(data))
    if options.captions and kind not in ("webdataset", *WORLDS):
        raise ValueError(
            f"--captions {options.captions}: only shards, scenes and collages have captions by "
            "name; leave it out, all captions of a table are used alike"
        )
    if features and kind != "webdataset":
        raise ValueError(
            f"--distill-shards: {data} is {kind}, and only shards hold a teacher's features; give "
            "files of them: --distill-embeddings"
        )
    if kind == "webdataset":
        cache = ShardCache(options.cache_dir, options.cache_bytes)
        captions = tuple(options.caption_weights)
        return ShardSource(data, required, cache, captions, optional_texts, features, by_row)
    sources: list[Source] = []
    for part in data.split("::"):
        number = count or DRAWN.get(split, DRAWN["val"])
        if kind in WORLDS:
            sources.append(_open_world(part, kind, options, split, number, negatives))
        else:
            sources.append(_open_one(part, kind, options, split, count, required))
    classes = {tuple(source.classes) for source in sources if isinstance(source, FolderSource)}
    if len(classes) > 1:
        raise ValueError(f"the folders of {data} hold different classes, so their labels differ")
    return sources[0] if len(sources) == 1 else Mixture(sources)


def shard_weights(source: Source, factors: str | None) -> tuple[float, ...] | None:
    """The order's weight of each shard from open_clip's `--train-data-upsampling-factors`.

    Args:
        source: the data, of as many patterns as there are factors.
        factors: one number for each pattern of the data, joined by '::'; None for no weights.

    Returns:
        A number for each shard, for `fastclip.data.order.Order`; None without factors.

    Raises:
        ValueError: their number differs from the patterns', one is not a positive number, or a
            factor of a table is not a whole number.

    Examples:
        >>> from fastclip.data.sources import open_source, shard_weights
        >>> source = open_source("scenes::scenes:caption=dense", split="train", count=100)
        >>> shard_weights(source, "1::3")
        (1.0, 3.0)
    """
    if factors is None:
        return None
    flag = f"--train-data-upsampling-factors {factors}"
    try:
        values = [float(factor) for factor in factors.split("::")]
    except ValueError as error:
        raise ValueError(f"{flag}: give numbers joined by '::', e.g. 1::2.5") from error
    if len(values) != len(source.parts):
        raise ValueError(
            f"{flag} has {len(values)} factors for the {len(source.parts)} patterns of the "
            "training data; give one each, joined by '::'"
        )
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"{flag}: give positive numbers, and leave out data you do not want")
    if not isinstance(source, ShardSource) and any(value % 1 for value in values):
        # a table's stretches are too short to be cut
        raise ValueError(f"{flag}: only shards take fractions; give e.g. 2::5 for 1::2.5")
    return tuple(value for value, n in zip(values, source.parts, strict=True) for _ in range(n))


def open_photographs(data: str, options: DataOptions | None = None) -> Photographs:
    """The labeled photographs that collages are made of, with the names of their classes.

    Args:
        data: shards with a class index (KEY.cls) in each sample and classes.txt beside them, or a
            folder with one folder of images per class.
        options: how to read it; None for the defaults.

    Raises:
        ValueError, FileNotFoundError: the data are neither, or cannot be read, or have no class
            names, or too few photographs of a class; the message says why.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from fastclip.data.sources import open_photographs
        >>> for name in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2"):
        ...     path = Path("photographs", f"{name}.png")
        ...     path.parent.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (48, 32), "red").save(path)
        >>> photographs = open_photographs("photographs")
        >>> photographs.classes, photographs.picture("dog", "val", draw=7).size
        (('cat', 'dog'), (32, 32))
    """
    names = _photograph_classes(data)
    options = replace(options or DataOptions(), dataset_type="auto", captions=None, templates=None)
    # samples of shards that have no label are left out later, with a message of its own
    required: tuple[str, ...] = () if guess_type(data) == "webdataset" else ("cls",)
    return Photographs(open_source(data, options, split="train", required=required), names)


def collage_classes(data: str) -> list[str]:
    """The class names of the collages that `data` names, in the order of their labels.

    Args:
        data: "collages" or "collages:KEY=VALUE,...".

    Raises:
        ValueError, FileNotFoundError: see `open_photographs`.

    Examples:
        >>> from fastclip.data.sources import collage_classes
        >>> collage_classes("collages:objects=1")[:3]
        ['circle', 'square', 'triangle']
    """
    photos = CollageSource.parse(data).get(PHOTOS_KEY)
    return list(SHAPES) if photos is None else short_names(_photograph_classes(photos))


def _guess_part(part: str) -> DatasetType | None:
    for name in WORLDS:
        if part.partition(":")[0] == name:
            return name
    if part == "synthetic":
        return "synthetic"
    path = Path(part).expanduser()
    # os.path takes a name that is too long for one that is not there
    if os.path.isdir(path):
        return "imagefolder" if holds_image_folders(path) else None
    ending = path.suffix.lower()
    if ending in ENDINGS:
        return ENDINGS[ending]
    shards = is_remote(part) or "{" in part or ".tar" in path.name.lower()
    return "webdataset" if shards else None


def _is_folder(part: str) -> bool:
    return os.path.isdir(os.path.expanduser(part))


def _open_world(
    part: str, kind: DatasetType, options: DataOptions, split: str, count: int, negatives: bool
) -> SceneSource | CollageSource:
    chosen = WORLDS[kind].parse(part)
    split = chosen.get("split", split)
    objects = int(chosen["objects"]) if "objects" in chosen else None
    texts = chosen.get("caption", "short"), tuple(options.caption_weights), negatives
    if kind == "scenes":
        return SceneSource(split, count, objects, chosen.get("shift"), *texts)
    photos = open_photographs(chosen[PHOTOS_KEY], options) if PHOTOS_KEY in chosen else None
    return CollageSource(photos, split, count, objects, *texts)


def _photograph_classes(data: str) -> list[str]:
    """The names of the classes of photographs, as they are written."""
    kind = guess_type(data)
    if kind == "imagefolder":
        return class_names(Path(data.split("::")[0]).expanduser())
    if kind != "webdataset":
        found = "of no known type" if kind is None else f"of type {kind}"
        raise ValueError(
            f"photos={data}: collages need photographs with classes, and these data are {found}; "
            "give shards with a class index (KEY.cls) in each sample, or a folder with one folder "
            "of images per class"
        )
    names = read_beside(expand_shards(data)[0], CLASS_FILES)
    if names is None:
        raise ValueError(
            f"photos={data}: there are no class names; put classes.txt beside the shards, one "
            "name a line in the order of the class indices"
        )
    return names


def _open_one(
    part: str,
    kind: DatasetType,
    options: DataOptions,
    split: str,
    count: int | None,
    required: tuple[str, ...],
) -> Source:
    if kind == "synthetic":
        return SyntheticSource(split, count or SYNTHETIC)
    path = Path(part).expanduser()
    if kind == "imagefolder" and not required and not has_classes_alone(path):
        return TreeSource(path)
    if kind == "imagefolder":
        return FolderSource(
            path, read_lines(Path(options.templates).expanduser()) if options.templates else None
        )
    return open_csv(path, options) if kind == "csv" else open_coco(path, options)


def _unrecognized(data: str) -> str:
    if os.path.isdir(data):
        example = f"{data.rstrip('/')}/{{00000..00009}}.tar"
        return (
            f"{data} is a folder without CLASS/*.jpg in it; if it holds shards, name them, "
            f"e.g. '{example}'"
        )
    return (
        f"cannot recognize {data!r} as data: give shards ('/data/{{00000..00041}}.tar'), a table "
        "(.csv, .tsv or .txt), a COCO .json, a folder of class folders, 'synthetic', 'scenes' or "
        "'collages', or say it with --dataset-type"
    )
