"""Writing webdataset shards, and their sample counts beside them."""

import fcntl
import glob
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text, writing
from fastclip.bounded import read_object
from fastclip.data.samples import Sample

# All else is JPEG, which Pillow calls MPO where a second picture follows.
EXTENSIONS = {"PNG": "png", "WEBP": "webp"}


@dataclass
class DetailedSample(Sample):
    """A sample that brings what its KEY.json is to hold, in place of the list of its captions."""

    details: dict[str, Any] | None = None


def write_shards(samples: Iterable[Sample], folder: Path, prefix: str, per_shard: int) -> list[int]:
    """Write `PREFIX-00000.tar`, ... with KEY.jpg, KEY.txt and KEY.cls; returns the sample counts.

    Args:
        samples: written in the order given; a label of None leaves KEY.cls out. One that carries
            its `encoded` image keeps it as it is, and all of its captions in KEY.json, or its
            details where it has some.
        folder: made if needed; `sizes.json` in it gets an entry a shard.
        per_shard: most samples in one shard.

    Raises:
        FileExistsError: shards with that prefix are there already; nothing is overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(folder.glob(f"{glob.escape(prefix)}-[0-9][0-9][0-9][0-9][0-9].tar"))
    if existing:
        raise FileExistsError(f"{existing[0]} exists; delete it, or choose another folder")
    counts: list[int] = []
    waiting = iter(samples)
    while first := next(waiting, None):
        path = folder / f"{prefix}-{len(counts):05d}.tar"
        counts.append(0)
        with (
            writing(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for sample in chain([first], islice(waiting, per_shard - 1)):
                _add_sample(tar, sample)
                counts[-1] += 1
        add_sizes(folder, {path.name: counts[-1]})
    return counts


def add_sizes(folder: Path, counts: dict[str, int]) -> None:
    """Add shards' sample counts to `sizes.json`, also while other processes add theirs.

    Raises:
        ValueError: the file that is there is damaged.
    """
    path = folder / "sizes.json"
    with locked(folder):
        try:
            sizes = read_object(path) if path.is_file() else {}
            text = json.dumps(sizes | counts, indent=1) + "\n"
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); repair or delete it") from error
        write_text(path, text)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time do what follows in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # some file systems have no locks; there, one process must do at a time
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    if sample.encoded is None:
        jpeg = io.BytesIO()
        sample.image.convert("RGB").save(jpeg, "JPEG", quality=95)
        parts = {"jpg": jpeg.getvalue(), "txt": sample.texts[0].encode()}
    else:
        extension = EXTENSIONS.get(sample.image.format or "", "jpg")
        details = sample.details if isinstance(sample, DetailedSample) else None
        described = json.dumps(details or {"captions": sample.texts}, ensure_ascii=False)
        parts = {extension: sample.encoded, "txt": sample.texts[0].encode()}
        parts["json"] = described.encode()
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    for extension, content in parts.items():
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
