"""The index of a tar shard: where each sample's files lie, and every fault on the way.

Python's tarfile ends its iteration silently at a torn or damaged header after the first member;
the check after the loop is what tells that from a proper end.
"""

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 64 << 20

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_BLOCK = 512


@dataclass(frozen=True)
class Fault:
    """Something unreadable, skipped and counted: a kind in a few fixed words, and where it is."""

    kind: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class ShardIndex:
    """Samples of one shard in file order.

    samples: (key, {extension: (offset, bytes)}) with an image and every required extension.
    """

    samples: list[tuple[str, dict[str, tuple[int, int]]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def index_shard(path: Path, required: tuple[str, ...] = ()) -> ShardIndex:
    """Read the headers of a tar and group its members into samples.

    A sample is the members with one name up to the first dot of the basename; names that begin
    with two underscores are meta-data and passed over. Links, devices and other special members
    are never followed.

    Args:
        path: an uncompressed tar.
        required: extensions, besides an image, without which a sample is a fault.

    Raises:
        FileNotFoundError: there is no such file. Everything else is a `Fault` in the result.
    """
    with path.open("rb") as file:
        return index_file(file, str(path), required)


def index_file(file: BinaryIO, name: str, required: tuple[str, ...] = ()) -> ShardIndex:
    """`index_shard` of an open file; `name` says in faults what it is."""
    index = ShardIndex()
    size = os.fstat(file.fileno()).st_size
    start = file.read(_BLOCK)
    if not start:
        index.faults.append(Fault("empty file", name))
        return index
    for magic, form in _COMPRESSED.items():
        if start.startswith(magic):
            detail = f"{form}; unpack it, images are compressed already"
            index.faults.append(Fault("compressed shard", name, detail))
            return index

    groups: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                _add_member(member, name, size, groups, index.faults)
            end = tar.offset
        index.faults.extend(_end_faults(file, name, end, size))
    except (tarfile.TarError, ValueError, OSError) as error:
        # what was read stays usable; a member that runs past the end was reported already
        if end <= size:
            kind = "damaged header" if end else "not a tar"
            index.faults.append(Fault(kind, name, str(error)))

    for key, files in groups.items():
        missing = [extension for extension in required if extension not in files]
        if not any(extension in files for extension in IMAGE_EXTENSIONS):
            missing.insert(0, "image")
        if missing:
            index.faults.append(Fault(f"sample without {missing[0]}", f"{name}:{key}"))
        else:
            index.samples.append((key, files))
    return index


def _add_member(
    member: tarfile.TarInfo,
    shard: str,
    shard_bytes: int,
    groups: dict[str, dict[str, tuple[int, int]]],
    faults: list[Fault],
) -> None:
    if member.isdir():
        return
    where = f"{shard}:{member.name}"
    if not member.isreg() or member.issparse():
        faults.append(Fault("link or special member", where))
        return
    folder, basename = os.path.split(member.name)
    stem, dot, extension = basename.partition(".")
    if basename.startswith("__") or not dot or not stem:
        return
    if member.size > MAX_MEMBER_BYTES:
        faults.append(Fault("member too large", where, f"{member.size:,} bytes"))
        return
    if member.offset_data + member.size > shard_bytes:
        faults.append(Fault("cut inside a member", where))
        return
    files = groups.setdefault(os.path.join(folder, stem), {})
    extension = extension.lower()
    if extension in files:
        faults.append(Fault("duplicate member", where))
        return
    files[extension] = (member.offset_data, member.size)


def _end_faults(file: BinaryIO, name: str, end: int, size: int) -> list[Fault]:
    """What is wrong where tarfile stopped: nothing if two zero blocks (or one) begin there."""
    if end > size:
        # the last member runs past the end and was reported as cut
        return []
    file.seek(end)
    block = file.read(_BLOCK)
    if not block:
        return [Fault("no end-of-archive mark", name, "the shard may have been cut")]
    if len(block) < _BLOCK:
        return [Fault("cut inside a header", name, f"at byte {end:,} of {size:,}")]
    if block.strip(b"\0"):
        return [Fault("damaged header", name, f"at byte {end:,} of {size:,}, rest unread")]
    return []
