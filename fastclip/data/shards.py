"""Samples from webdataset tars, as img2dataset writes them, by (shard, index)."""

import os
import re
from collections import OrderedDict
from typing import BinaryIO

from braceexpand import braceexpand

from fastclip.data.counts import declared_counts
from fastclip.data.index import MAX_PLACES, Fault, ShardIndex, index_file
from fastclip.data.order import DEFAULT_WINDOW
from fastclip.data.regular import digest_of, open_regular, state_of
from fastclip.data.remote import FetchError, ShardCache, is_remote
from fastclip.data.samples import Sample, SampleReader, UnreadableSample

# some windows' worth, whatever the size of the shards; about 0.6 kB each
INDEX_CACHE_SAMPLES = 4 * DEFAULT_WINDOW

# Other programs' notations for commands, also with a slip in them, and fsspec's "reference", whose
# files hold templates that are evaluated.
_RUNS_SOMETHING = re.compile(
    r"\s*(\||(pipe|exec|shell|sh|bash|cmd|popen|system|reference)\s*:)", re.IGNORECASE
)


def expand_shards(pattern: str) -> list[str]:
    """Paths and URLs of `a-{00000..00041}.tar::s3://b/{0..9}.tar`, in the order written.

    Raises:
        ValueError: a part of the pattern names no shard, or is a command.
        FileNotFoundError: a local shard does not exist.
    """
    return [name for part in _expand_parts(pattern) for name in part]


def _expand_parts(pattern: str) -> list[list[str]]:
    """The shards of each of the patterns joined by '::'."""
    refuse_commands(pattern)
    parts: list[list[str]] = []
    for part in pattern.split("::"):
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


def refuse_commands(data: str) -> None:
    """Raise a ValueError for data of which a part is a command elsewhere: nothing is run here."""
    for part in data.split("::"):
        if _RUNS_SOMETHING.match(part):
            raise ValueError(
                f"{part!r} would run a command, and fastclip runs none; name shards by URLs that "
                "fsspec reads, such as s3://bucket/{00000..00041}.tar, or mount the storage and "
                "name files"
            )


class ShardSource:
    """Random access to the samples of a list of shards.

    A sample's captions are the list "captions" of KEY.json where there is one, else KEY.txt. Its
    hard negatives are the list "hard_negatives" of KEY.json.

    Args:
        pattern: see `expand_shards`.
        required: extensions a sample must have besides an image, e.g. ("txt",) or ("cls",).
        captions: sources of captions to keep apart: "txt", and keys of KEY.json that hold a text
            or a list of texts. A sample then needs a caption of one of these only.
        optional_texts: read captions where there are some, although none are required; a damaged
            one is left out.
        features: read a teacher's features, KEY.teacher_image.npy and KEY.teacher_text.npy.
        by_row: files elsewhere have a row for each sample, so that none may be left out for want of
            a caption: whoever wrote the rows may have counted it.
        cache: where remote shards are kept; by default fastclip's folder of the user's cache.

    Attributes:
        counts: samples in each shard as declared by `sizes.json` or `_stats.json` beside it, or
            else counted now. A declared count may prove too high when the shard is read.
        parts: number of shards of each pattern joined by '::'.
        window: samples that are read in any order; the places in the shards, 0.6 kB a sample, are
            kept of two windows, and of 131,072 samples at least.

    Raises:
        ValueError: there is no readable sample at all; the message lists the faults found.
            Also, here or when a shard is first read: samples are left out despite `by_row`.
        FetchError: a remote shard whose samples must be counted cannot be fetched.
    """

    def __init__(
        self,
        pattern: str,
        required: tuple[str, ...] = ("txt",),
        cache: ShardCache | None = None,
        captions: tuple[str, ...] = (),
        optional_texts: bool = False,
        features: bool = False,
        by_row: bool = False,
    ) -> None:
        parts = _expand_parts(pattern)
        self.names = [name for part in parts for name in part]
        self.parts = tuple(len(part) for part in parts)
        self._reader = SampleReader(required, captions, optional_texts, features)
        self.cache = cache or ShardCache()
        self.counts: tuple[int, ...] = ()
        self.window = DEFAULT_WINDOW
        self._by_row = by_row
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._indexed = 0
        self._faults: list[Fault] = []
        declared = declared_counts(self.names)
        self.counts = tuple(self._count(shard, declared) for shard in range(len(self.names)))
        if sum(self.counts) == 0:
            found = "; ".join(map(str, self._faults[:5])) or f"{self.names[0]} names none"
            raise ValueError(f"no readable sample in {len(self.names)} shards: {found}")

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The sample at `index` of `shard`; without `pixels` its image is opened, not decoded.

        Raises:
            UnreadableSample: with the reason and the place.
            ValueError: a teacher's features are no vector.
        """
        name = self.names[shard]
        try:
            with open_shard(name, self.cache) as file:
                samples = self._index(shard, file).samples
                if index >= len(samples):
                    detail = f"{len(samples)} readable of {self.counts[shard]} declared"
                    raise UnreadableSample(Fault("fewer samples than declared", name, detail))
                key, files = samples[index]
                contents = self._reader.contents(file, files, f"{name}:{key}")
        except FetchError as error:
            raise UnreadableSample(Fault("shard not fetched", name, str(error))) from error
        except OSError as error:
            raise UnreadableSample(Fault("shard not readable", name, str(error))) from error
        return self._reader.sample(key, contents, f"{name}:{key}", pixels=pixels)

    def labels(self, shard: int) -> list[int | None]:
        """The class index of each sample of a shard, read without its image.

        Args:
            shard: its number.

        Returns:
            None where a sample has no class index or a damaged one.

        Raises:
            OSError: the shard cannot be read. FetchError, which is one: it cannot be fetched.
        """
        name = self.names[shard]
        with open_shard(name, self.cache) as file:
            samples = self._index(shard, file).samples
            return [self._reader.label_of(file, files, f"{name}:{key}") for key, files in samples]

    def place(self, shard: int) -> str:
        """The name of the shard."""
        return self.names[shard]

    def drain_faults(self) -> list[Fault]:
        """The faults found in shards since the last call (not those of single samples)."""
        faults, self._faults = self._faults, []
        return faults

    def digest(self) -> str:
        """Of the shards' names and numbers of samples, and of local ones their sizes and times."""
        local = (None if is_remote(name) else state_of(name) for name in self.names)
        return digest_of(zip(self.names, self.counts, local, strict=True))

    def _count(self, shard: int, declared: dict[str, int]) -> int:
        name = self.names[shard]
        count = declared.get(name)
        if count is None:
            with open_shard(name, self.cache) as file:
                count = len(self._index(shard, file).samples)
        return count

    def _index(self, shard: int, file: BinaryIO) -> ShardIndex:
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        index = index_file(file, self.names[shard], self._reader.required)
        if self._by_row:
            _require_captions(index, self.names[shard])
        self._faults.extend(index.faults)
        for kind, count in index.counts.items():
            if count > MAX_PLACES:
                more = Fault(kind, self.names[shard], f"{count - MAX_PLACES:,} more in this shard")
                self._faults.append(more)
        self._indexes[shard] = index
        self._indexed += len(index.samples)
        room = max(INDEX_CACHE_SAMPLES, 2 * self.window)
        while self._indexed > room and len(self._indexes) > 1:
            _, oldest = self._indexes.popitem(last=False)
            self._indexed -= len(oldest.samples)
        declared = self.counts[shard] if self.counts else None
        if declared is not None and len(index.samples) > declared:
            detail = f"{len(index.samples)} readable, {declared} declared; the rest is not read"
            fault = Fault("more samples than declared", self.names[shard], detail)
            self._faults.append(fault)
        return index


def open_shard(name: str, cache: ShardCache) -> BinaryIO:
    """A local shard, or a remote one's copy, which is fetched if it is not in the cache.

    Raises:
        OSError: it cannot be opened. FetchError, which is one: it cannot be fetched.
    """
    return cache.open(name) if is_remote(name) else open_regular(name)


def _require_captions(index: ShardIndex, name: str) -> None:
    """Raise a ValueError where samples were left out that have an image."""
    if count := index.counts["sample without txt"]:
        raise ValueError(
            f"{name}: {count} times sample without txt. Rows of --distill-embeddings may count "
            "these, and the samples after them would get another's features; put features into the "
            "shards (fastclip embed shards, --distill-shards), or leave such samples out of them"
        )
