"""Samples whose images are files of their own."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastclip.data.index import MAX_MEMBER_BYTES, Fault
from fastclip.data.regular import digest_of, open_regular, state_of
from fastclip.data.samples import Sample, UnreadableSample, decode, open_image

# Tables are cut into stretches of this many rows, which the order shuffles as it does shards: long
# enough that millions of rows make a short list, short enough that a table sorted by class, of
# which a shuffling window holds a part only, is mixed well.
STRETCH = 16

PROBES = 100


class ImageFiles(ABC):
    """Random access to images named by path; tables and folders say what belongs to each.

    Args:
        name: of the table or folder, for messages.
        count: number of samples, at least one.
        roots: folders that relative paths are tried in, in this order.

    Attributes:
        counts: samples in each stretch of the table.
        parts: one pattern, of that many stretches.
    """

    def __init__(self, name: str, count: int, roots: tuple[Path, ...]) -> None:
        if count == 0:
            raise ValueError(f"{name} holds no sample")
        self.name = name
        self.count = count
        self.roots = roots
        rest = count % STRETCH
        self.counts = (STRETCH,) * (count // STRETCH) + ((rest,) if rest else ())
        self.parts: tuple[int, ...] = (len(self.counts),)

    @abstractmethod
    def path_of(self, index: int) -> str:
        """The image's path as it was written."""

    @abstractmethod
    def texts_of(self, index: int) -> tuple[str, ...]:
        """The sample's captions."""

    def label_of(self, index: int) -> int | None:
        """The class index, None where there are no classes."""
        return None

    def labels(self, shard: int) -> list[int | None]:
        """The class index of each sample of a stretch."""
        first = shard * STRETCH
        return [self.label_of(first + index) for index in range(self.counts[shard])]

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The sample at `index` of stretch `shard`; without `pixels` its image is only opened.

        Raises:
            UnreadableSample: with the reason and the place.
        """
        number = shard * STRETCH + index
        path = self.path_of(number)
        where = f"{self.name}:{path}"
        encoded = self.read_bytes(number)
        image = open_image(encoded, where)
        if pixels:
            image = decode(image, where)
        sample = Sample(path, image, self.texts_of(number), self.label_of(number), encoded)
        sample.where = where
        return sample

    def read_bytes(self, number: int) -> bytes:
        """The image file of a sample, as it is.

        Raises:
            UnreadableSample: it is missing, not a file, or over 64 MiB.
        """
        path = self.path_of(number)
        where = f"{self.name}:{path}"
        try:
            found = self._find(path)
            if found is None:
                raise UnreadableSample(Fault("missing image file", where))
            return read_image_file(found, where)
        except OSError as error:
            raise UnreadableSample(Fault("unreadable image file", where, str(error))) from error

    def place(self, shard: int) -> str:
        """The name of the table or folder."""
        return self.name

    def drain_faults(self) -> list[Fault]:
        """Faults lie in single samples only."""
        return []

    def digest(self) -> str:
        """Of all paths, and of the files' sizes and times."""
        return digest_of(self._states())

    def _states(self) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
        for path in map(self.path_of, range(self.count)):
            found = self._find(path)
            yield path, str(found), state_of(found) if found else None

    def check_paths(self) -> None:
        """Look for some of the images.

        Raises:
            FileNotFoundError: none of them is there; the message says where they were looked for.
        """
        chosen = np.unique(np.linspace(0, self.count - 1, PROBES).astype(np.int64)).tolist()
        if any(self._find(self.path_of(number)) is not None for number in chosen):
            return
        first = self.path_of(0)
        if "://" in first:
            raise FileNotFoundError(
                f"{self.name}: {first} is a URL; fetch the images first, e.g. with img2dataset, "
                "whose tars can be trained on as they are"
            )
        places = ", then ".join(dict.fromkeys(str(root.absolute()) for root in self.roots))
        raise FileNotFoundError(
            f"{self.name}: none of {len(chosen)} images looked for exists, the first {first!r}; "
            f"relative paths were tried in {places}; give --image-root (--val-image-root for "
            "--val-data) or fix the paths"
        )

    def _find(self, path: str) -> Path | None:
        if "\0" in path:
            return None
        # joining an absolute path gives that path, whatever the root
        candidates = (root / path for root in self.roots)
        return next((found for found in candidates if os.path.exists(found)), None)


def read_image_file(path: Path, where: str) -> bytes:
    """An image file, as it is.

    Raises:
        UnreadableSample: it is not a regular file, or over 64 MiB. OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        # opening a named pipe would wait for ever
        raise UnreadableSample(Fault("image path is not a file", where))
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MEMBER_BYTES:
            raise UnreadableSample(Fault("image file too large", where, f"{size:,} bytes"))
        # files of the system that have no size may give bytes without end, or wait
        return file.read(size) if size else b""


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file of the formats that are read, from its header.

    Raises:
        OSError: it is no such file.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise OSError(f"{path}: {error}") from error
