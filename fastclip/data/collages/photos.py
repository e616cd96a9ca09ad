"""What the places of a collage show: photographs of a labeled source, or single drawn shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from fastclip.data.collages.world import held_out
from fastclip.data.files import ImageFiles
from fastclip.data.index import Fault
from fastclip.data.order import hash64, permutation
from fastclip.data.regular import digest_of
from fastclip.data.samples import Source
from fastclip.data.scenes.render import render
from fastclip.data.scenes.world import BACKGROUNDS, COLORS, SHAPES, SPLITS, STYLES, Object, Scene
from fastclip.data.scenes.world import View as SceneView
from fastclip.data.shards import ShardSource
from fastclip.data.streams import Stream

# Side of a photograph in a collage, in pixels.
PHOTO_PIXELS = 32
# One photograph of a class in so many is for val, another for test and compositional.
PART = 10
MIN_PHOTOS = 3

_SHAPE_KEY = 202
# How much larger a shape is drawn than the large objects of scenes.
_SHAPE_SCALE = 1.7


class Pictures(Protocol):
    """Pictures of classes, those of train, val and test apart."""

    classes: tuple[str, ...]

    def picture(self, name: str, split: str, draw: int) -> Image.Image:
        """A picture of a class, PHOTO_PIXELS wide and high: the one that an integer draws."""
        ...

    def drain_faults(self) -> list[Fault]: ...

    def digest(self) -> str: ...


class Photographs:
    """The photographs of a labeled source by class.

    Of each class a tenth is for val, a tenth for test and compositional, and the rest for train,
    chosen by a hash; so none of them shows a photograph of another. The places of all in their
    shards are kept in memory, about 0.6 kB each.

    Args:
        source: whose samples have labels; those without are left out.
        classes: the name of each label, up to its first comma.

    Raises:
        ValueError: no sample has a label, a label has no name, a name is empty or that of two
            classes, or a class has fewer than three photographs.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from fastclip.data.collages import Photographs
        >>> from fastclip.data.folders import FolderSource
        >>> for name in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2"):
        ...     path = Path("photographs", f"{name}.png")
        ...     path.parent.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (48, 32), "red").save(path)
        >>> photographs = Photographs(FolderSource(Path("photographs")), ["cat", "dog"])
        >>> photographs.picture("dog", "val", draw=7).size
        (32, 32)
    """

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        self.source = source
        if isinstance(source, ShardSource):
            # they are drawn from anywhere: no shard must be walked through again for one
            source.window = sum(source.counts)
        self.classes = tuple(short_names(classes))
        self._starts = np.cumsum((0, *source.counts))
        found = [_labels(source, shard) for shard in range(len(source.counts))]
        place = source.place(0)
        if all(label is None for labels in found for label in labels):
            raise ValueError(
                f"{place} has no classes; collages need photographs with a class index (KEY.cls) "
                "each, or one folder of images per class"
            )
        self._check_names(place)
        numbers: list[list[int]] = [[] for _ in classes]
        for start, labels in zip(self._starts.tolist(), found, strict=False):
            for number, label in enumerate(labels, start):
                if label is None:
                    continue
                if label >= len(classes):
                    raise ValueError(
                        f"{place} has label {label}, the {len(classes)} classes are "
                        f"0..{len(classes) - 1}; name all classes in their order"
                    )
                numbers[label].append(number)
        self._numbers = {
            name: _parts(name, of_class)
            for name, of_class in zip(self.classes, numbers, strict=True)
        }

    def picture(self, name: str, split: str, draw: int) -> Image.Image:
        """A photograph of a class, cut to a square about its middle and resized.

        Args:
            name: of the class.
            split: whose photographs are drawn from.
            draw: an integer in [0, 2**64), each photograph for as many of these.

        Raises:
            UnreadableSample: it cannot be read.
        """
        numbers = self._numbers[name][split]
        number = int(numbers[(draw * len(numbers)) >> 64])
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        image = self.source.read(shard, number - int(self._starts[shard])).image
        size = (PHOTO_PIXELS, PHOTO_PIXELS)
        return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BICUBIC)

    def drain_faults(self) -> list[Fault]:
        """The faults of the source."""
        return self.source.drain_faults()

    def digest(self) -> str:
        """Of the source and the names."""
        return digest_of([self.source.digest(), self.classes])

    def _check_names(self, place: str) -> None:
        for label, name in enumerate(self.classes):
            if not any(letter.isalnum() for letter in name):
                raise ValueError(f"{place}: class {label} is called {name!r}; give it a name")
        held_out(self.classes)


def short_names(classes: Sequence[str]) -> list[str]:
    """The names that captions use of classes with several, with commas between them: the first."""
    return [name.split(",")[0].strip() for name in classes]


def _labels(source: Source, shard: int) -> Sequence[int | None]:
    """The label of each of a shard's samples, if possible without reading the images."""
    # a shard may hold more samples than were declared
    count = source.counts[shard]
    if isinstance(source, (ShardSource, ImageFiles)):
        return source.labels(shard)[:count]
    return [source.read(shard, index, pixels=False).label for index in range(count)]


def _parts(name: str, numbers: list[int]) -> dict[str, np.ndarray]:
    """The photographs of a class for each split."""
    count = len(numbers)
    if count < MIN_PHOTOS:
        raise ValueError(
            f"class {name!r} has {count} photographs; collages need at least {MIN_PHOTOS} of each "
            "class, one each for train, val and test: add some, or leave the class out"
        )
    mixed = np.array(numbers)[permutation(count, hash64(*name.encode()))]
    size = max(1, count // PART)
    val, test, train = np.split(mixed, [size, 2 * size])
    parts = {"train": train, "val": val, "test": test, "compositional": test}
    return {split: parts[split] for split in SPLITS}


class Shapes:
    """Pictures of single objects of the embedded scenes, in any color; the classes are shapes.

    Examples:
        >>> from fastclip.data.collages.photos import Shapes
        >>> Shapes().picture("star", "val", draw=7).size
        (32, 32)
    """

    classes: tuple[str, ...] = SHAPES

    def picture(self, name: str, split: str, draw: int) -> Image.Image:
        """A shape in a color, a style, at a place and on a background that an integer draws.

        Args:
            name: of the shape.
            split: pictures of another one are drawn apart.
            draw: an integer in [0, 2**64).
        """
        split_index = SPLITS.index(split)
        stream = Stream(_SHAPE_KEY, split_index, draw)
        x, y = (round(stream.uniform(0.42, 0.58), 4) for _ in range(2))
        scene = Scene(
            objects=(Object(name, stream.choice(COLORS), "large", x, y),),
            relation=None,
            background=stream.choice(BACKGROUNDS),
            style=stream.choice(STYLES),
            view=SceneView(scale=_SHAPE_SCALE),
            # as in scenes: no picture of one split can equal a picture of another
            seed=(stream.bits() & ~3) | split_index,
        )
        return render(scene, PHOTO_PIXELS)

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []

    def digest(self) -> str:
        """Of what the pictures are made from."""
        return type(self).__name__
