"""Samples from webdataset tars, as img2dataset writes them, by (shard, index)."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from fastclip.data.index import IMAGE_EXTENSIONS, Fault, ShardIndex, index_file
from fastclip.data.order import DEFAULT_WINDOW
from fastclip.data.remote import FetchError, ShardCache, is_remote, remote_counts
from fastclip.data.samples import MAX_TEXT_BYTES, Sample, UnreadableSample, decode_image

# some windows' worth, whatever the size of the shards; about 0.6 kB each
INDEX_CACHE_SAMPLES = 4 * DEFAULT_WINDOW


def expand_shards(pattern: str) -> list[str]:
    """Paths and URLs of `a-{00000..00041}.tar::s3://b/{0..9}.tar`, in the order written.

    Raises:
        ValueError: the pattern is a command, or a part of it names no shard.
        FileNotFoundError: a local shard does not exist.
    """
    return [name for part in _expand_parts(pattern) for name in part]


def _expand_parts(pattern: str) -> list[list[str]]:
    """The shards of each of the patterns joined by '::'."""
    parts: list[list[str]] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:"):
            raise ValueError(
                f"{part!r} is a command; fastclip does not run commands from data paths"
            )
        names = [name for name in braceexpand(part) if name]
        if not names:
            raise ValueError(f"{part!r} names no shard; give e.g. '/data/{{00000..00041}}.tar'")
        parts.append([n if is_remote(n) else os.path.expanduser(n) for n in names])
    local = [name for part in parts for name in part if not is_remote(name)]
    missing = [name for name in local if not os.path.isfile(name)]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(local)} shards do not exist: {shown}; "
            "check the path and the range in braces"
        )
    return parts


class ShardSource:
    """Random access to the samples of a list of shards.

    A sample's captions are the list "captions" of KEY.json where there is one, else KEY.txt.

    Args:
        pattern: see `expand_shards`.
        required: extensions a sample must have besides an image, e.g. ("txt",) or ("cls",).
        cache: where remote shards are kept; by default fastclip's folder of the user's cache.

    Attributes:
        counts: samples in each shard as declared by `sizes.json` or `_stats.json` beside it, or
            else counted now. A declared count may prove too high when the shard is read.
        parts: number of shards of each pattern joined by '::'.

    Raises:
        ValueError: there is no readable sample at all; the message lists the faults found.
        FetchError: a remote shard whose samples must be counted cannot be fetched.
    """

    def __init__(
        self,
        pattern: str,
        required: tuple[str, ...] = ("txt",),
        cache: ShardCache | None = None,
    ) -> None:
        parts = _expand_parts(pattern)
        self.names = [name for part in parts for name in part]
        self.parts = tuple(len(part) for part in parts)
        self.required = required
        self.cache = cache or ShardCache()
        self.counts: tuple[int, ...] = ()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._indexed = 0
        self._faults: list[Fault] = []
        declared = remote_counts([name for name in self.names if is_remote(name)])
        self.counts = tuple(self._count(shard, declared) for shard in range(len(self.names)))
        if sum(self.counts) == 0:
            found = "; ".join(map(str, self._faults[:5])) or "no members"
            raise ValueError(f"no readable sample in {len(self.names)} shards: {found}")

    def read(self, shard: int, index: int) -> Sample:
        """The sample at `index` of `shard`, its image decoded to RGB.

        Raises:
            UnreadableSample: with the reason and the place.
        """
        name = self.names[shard]
        try:
            with self._open(shard) as file:
                samples = self._index(shard, file).samples
                if index >= len(samples):
                    detail = f"{len(samples)} readable of {self.counts[shard]} declared"
                    raise UnreadableSample(Fault("fewer samples than declared", name, detail))
                key, files = samples[index]
                parts = {
                    extension: os.pread(file.fileno(), size, offset)
                    for extension, (offset, size) in files.items()
                    if extension in IMAGE_EXTENSIONS or self._wants(extension, size)
                }
        except FetchError as error:
            raise UnreadableSample(Fault("shard not fetched", name, str(error))) from error
        where = f"{name}:{key}"
        encoded = next(parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts)
        texts = _listed_captions(parts["json"]) if "json" in parts else ()
        if not texts and "txt" in parts:
            texts = (_decode_text(parts["txt"], where),)
        label = _decode_label(parts["cls"], where) if "cls" in parts else None
        return Sample(key, decode_image(encoded, where), texts, label)

    def drain_faults(self) -> list[Fault]:
        """The faults found in shards since the last call (not those of single samples)."""
        faults, self._faults = self._faults, []
        return faults

    def _wants(self, extension: str, size: int) -> bool:
        if extension == "json":
            return "txt" in self.required and size <= MAX_TEXT_BYTES
        return extension in self.required or extension == "cls"

    def _count(self, shard: int, declared: dict[str, int]) -> int:
        name = self.names[shard]
        count = declared.get(name) if is_remote(name) else _declared_count(Path(name))
        if count is None:
            with self._open(shard) as file:
                count = len(self._index(shard, file).samples)
        return count

    def _open(self, shard: int) -> BinaryIO:
        name = self.names[shard]
        return self.cache.open(name) if is_remote(name) else open(name, "rb")

    def _index(self, shard: int, file: BinaryIO) -> ShardIndex:
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        index = index_file(file, self.names[shard], self.required)
        self._faults.extend(index.faults)
        self._indexes[shard] = index
        self._indexed += len(index.samples)
        while self._indexed > INDEX_CACHE_SAMPLES and len(self._indexes) > 1:
            _, oldest = self._indexes.popitem(last=False)
            self._indexed -= len(oldest.samples)
        declared = self.counts[shard] if self.counts else None
        if declared is not None and len(index.samples) > declared:
            detail = f"{len(index.samples)} readable, {declared} declared; the rest is not read"
            fault = Fault("more samples than declared", self.names[shard], detail)
            self._faults.append(fault)
        return index


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


def _listed_captions(encoded: bytes) -> tuple[str, ...]:
    """The list "captions" of a sample's JSON; empty where there is none, KEY.txt then serves."""
    try:
        captions = json.loads(encoded).get("captions")
        if not isinstance(captions, list):
            return ()
        # half a surrogate pair, which JSON may spell and no tokenizer takes, fails here
        return tuple(c.encode().decode().strip() for c in captions if c.strip())
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ()


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
