"""Samples from webdataset tars, as img2dataset writes them, by (shard, index)."""

import io
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand
from PIL import Image, UnidentifiedImageError

from fastclip.data.index import IMAGE_EXTENSIONS, Fault, ShardIndex, index_shard

MAX_IMAGE_PIXELS = 25_000_000
MAX_TEXT_BYTES = 1 << 20
INDEX_CACHE_SHARDS = 64


@dataclass
class Sample:
    """One image with its captions; label is the class index where the data has one."""

    key: str
    image: Image.Image
    texts: tuple[str, ...]
    label: int | None = None


class UnreadableSample(Exception):
    """One sample cannot be used; the run goes on with another."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def expand_shards(pattern: str) -> list[Path]:
    """Paths of `a-{00000..00041}.tar::b-{0..9}.tar`, in the order written.

    Raises:
        ValueError: the pattern is a command or URL, or names no shard.
        FileNotFoundError: a shard does not exist.
    """
    paths: list[Path] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:"):
            raise ValueError(
                f"{part!r} is a command; fastclip does not run commands from data paths"
            )
        if "://" in part:
            raise ValueError(f"{part!r} is a URL; this version reads local shards")
        paths.extend(Path(os.path.expanduser(path)) for path in braceexpand(part) if path)
    if not paths:
        raise ValueError(f"{pattern!r} names no shard; give e.g. '/data/{{00000..00041}}.tar'")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards do not exist: {shown}; "
            "check the path and the range in braces"
        )
    return paths


class ShardSource:
    """Random access to the samples of a list of shards.

    Args:
        pattern: see `expand_shards`.
        required: extensions a sample must have besides an image, e.g. ("txt",) or ("cls",).

    Attributes:
        counts: samples in each shard as declared by `sizes.json` or `_stats.json` beside it, or
            else counted now. A declared count may prove too high when the shard is read.

    Raises:
        ValueError: there is no readable sample at all; the message lists the faults found.
    """

    def __init__(self, pattern: str, required: tuple[str, ...] = ("txt",)) -> None:
        self.paths = expand_shards(pattern)
        self.required = required
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._faults: list[Fault] = []
        self.counts = tuple(self._count(shard) for shard in range(len(self.paths)))
        if sum(self.counts) == 0:
            found = "; ".join(map(str, self._faults[:5])) or "no members"
            raise ValueError(f"no readable sample in {len(self.paths)} shards: {found}")

    def read(self, shard: int, index: int) -> Sample:
        """The sample at `index` of `shard`, its image decoded to RGB.

        Raises:
            UnreadableSample: with the reason and the place.
        """
        path = self.paths[shard]
        samples = self._index(shard).samples
        if index >= len(samples):
            detail = f"{len(samples)} readable of {self.counts[shard]} declared"
            raise UnreadableSample(Fault("fewer samples than declared", str(path), detail))
        key, files = samples[index]
        where = f"{path}:{key}"
        with path.open("rb") as file:
            parts = {
                extension: os.pread(file.fileno(), size, offset)
                for extension, (offset, size) in files.items()
                if extension in self.required or extension in IMAGE_EXTENSIONS or extension == "cls"
            }
        encoded = next(parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts)
        texts = (_decode_text(parts["txt"], where),) if "txt" in parts else ()
        label = _decode_label(parts["cls"], where) if "cls" in parts else None
        return Sample(key, decode_image(encoded, where), texts, label)

    def drain_faults(self) -> list[Fault]:
        """The faults found in shards since the last call (not those of single samples)."""
        faults, self._faults = self._faults, []
        return faults

    def _count(self, shard: int) -> int:
        declared = _declared_count(self.paths[shard])
        return len(self._index(shard).samples) if declared is None else declared

    def _index(self, shard: int) -> ShardIndex:
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        index = index_shard(self.paths[shard], self.required)
        self._faults.extend(index.faults)
        self._indexes[shard] = index
        if len(self._indexes) > INDEX_CACHE_SHARDS:
            self._indexes.popitem(last=False)
        return index


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """An RGB image from JPEG, PNG or WebP bytes.

    Raises:
        UnreadableSample: the bytes are no whole image, or it has over 25 million pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP"))
        if image.width * image.height > MAX_IMAGE_PIXELS:
            detail = f"{image.width} x {image.height}"
            raise UnreadableSample(Fault("image too large", where, detail))
        return image.convert("RGB")
    except UnreadableSample:
        raise
    except UnidentifiedImageError as error:
        detail = "no JPEG, PNG or WebP"
        raise UnreadableSample(Fault("corrupt image", where, detail)) from error
    # Pillow's decoders raise more than OSError on damaged input, and the set changes with releases
    except Exception as error:
        raise UnreadableSample(Fault("corrupt image", where, str(error)[:80])) from error


def _decode_text(encoded: bytes, where: str) -> str:
    if len(encoded) > MAX_TEXT_BYTES:
        raise UnreadableSample(Fault("caption too long", where, f"{len(encoded):,} bytes"))
    try:
        text = encoded.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UnreadableSample(Fault("caption is not UTF-8", where)) from error
    if not text:
        raise UnreadableSample(Fault("empty caption", where))
    return text


def _decode_label(encoded: bytes, where: str) -> int:
    try:
        return int(encoded)
    except ValueError as error:
        raise UnreadableSample(Fault("class index is no integer", where)) from error


def _declared_count(path: Path) -> int | None:
    """What sizes.json or img2dataset's _stats.json says of a shard, None where neither does."""
    sizes = path.with_name("sizes.json")
    stats = path.with_name(path.stem + "_stats.json")
    for file, name in ((sizes, path.name), (stats, "successes")):
        if file.is_file():
            try:
                count = json.loads(file.read_text()).get(name)
                if count is not None:
                    return int(count)
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error}); repair or delete it") from error
    return None
