"""Samples from webdataset tars, as img2dataset writes them, by (shard, index)."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand

from fastclip.data.index import IMAGE_EXTENSIONS, Fault, ShardIndex, index_file
from fastclip.data.order import DEFAULT_WINDOW
from fastclip.data.remote import FetchError, ShardCache, is_remote, remote_counts
from fastclip.data.samples import MAX_TEXT_BYTES, Sample, UnreadableSample, decode, open_image

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

    A sample's captions are the list "captions" of KEY.json where there is one, else KEY.txt. Its
    hard negatives are the list "hard_negatives" of KEY.json.

    Args:
        pattern: see `expand_shards`.
        required: extensions a sample must have besides an image, e.g. ("txt",) or ("cls",).
        captions: sources of captions to tell apart: "txt", and keys of KEY.json that hold a text
            or a list of texts. A sample then needs a caption of one of these only.
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
        captions: tuple[str, ...] = (),
    ) -> None:
        parts = _expand_parts(pattern)
        self.names = [name for part in parts for name in part]
        self.parts = tuple(len(part) for part in parts)
        self.captions = captions
        if captions:
            # any of them will do, which only reading tells where there are several
            members = {"txt" if name == "txt" else "json" for name in captions}
            others = tuple(extension for extension in required if extension != "txt")
            required = (*others, *(members if len(members) == 1 else ()))
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

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The sample at `index` of `shard`; without `pixels` its image is opened, not decoded.

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
        image = open_image(encoded, where)
        sample = Sample(key, decode(image, where) if pixels else image, (), encoded=encoded)
        self._add_texts(sample, parts, where)
        if "cls" in parts:
            sample.label = _decode_label(parts["cls"], where)
        return sample

    def _add_texts(self, sample: Sample, parts: dict[str, bytes], where: str) -> None:
        content = _json_object(parts.get("json", b""))
        sample.negatives = _texts(content.get("hard_negatives"))
        found: tuple[str, ...]
        for name in self.captions:
            if name != "txt":
                found = _texts(content.get(name))
            elif "txt" in parts:
                found = (_decode_text(parts["txt"], where),)
            else:
                found = ()
            if found:
                sample.captions[name] = found
        sample.texts = tuple(text for found in sample.captions.values() for text in found)
        if not sample.texts:
            listed = content.get("captions")
            sample.texts = _texts(listed) if isinstance(listed, list) else ()
            if not sample.texts and "txt" in parts:
                sample.texts = (_decode_text(parts["txt"], where),)
        if self.captions and not sample.texts:
            raise UnreadableSample(Fault("sample without caption", where))

    def drain_faults(self) -> list[Fault]:
        """The faults found in shards since the last call (not those of single samples)."""
        faults, self._faults = self._faults, []
        return faults

    def _wants(self, extension: str, size: int) -> bool:
        if extension == "json":
            wanted = "txt" in self.required or bool(self.captions)
            return wanted and size <= MAX_TEXT_BYTES
        return extension in self.required or extension == "cls" or extension in self.captions

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


def _json_object(encoded: bytes) -> dict[str, Any]:
    """A sample's KEY.json; empty where it is none, which KEY.txt then makes up for."""
    try:
        content = json.loads(encoded) if encoded else {}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a value of JSON, one or a list of them; empty where it is anything else."""
    try:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list):
            return ()
        # half a surrogate pair, which JSON may spell and no tokenizer takes, fails here
        return tuple(text.encode().decode().strip() for text in listed if text.strip())
    except (ValueError, AttributeError, TypeError):
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
