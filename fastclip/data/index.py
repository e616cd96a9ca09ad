"""The index of a tar shard: where each sample's files lie, and every fault on the way.

The headers are read here and not by Python's tarfile, which ends silently at a torn or damaged
header, reads extended headers whole whatever their size, takes negative sizes, and calls itself
once more for each extended header in a row.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastclip.data.regular import open_regular
from fastclip.printable import printable_line

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 64 << 20
# of one extended header; extended attributes may take 64 KiB, names 4 KiB
MAX_HEADER_BYTES = 1 << 20
MAX_NAME_BYTES = 4096
# Of a shard; one with a name of over 256 bytes counts for more. An index takes about 0.4 kB for
# each, so this is what bounds its memory.
MAX_MEMBERS = 4_000_000
# places kept of each kind of fault; the count continues
MAX_PLACES = 10_000

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
# archives are filled up with zeros to a multiple of their record, 10 KiB by default
_LOOK_BEHIND_END = 1 << 20

_OCTAL = re.compile(rb"[0-7]*")
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_FILES = (b"0", b"\0", b"7")
# Solaris writes X for x
_PAX = (b"x", b"X", b"g")
_EXTENDED = (*_PAX, b"L", b"K")
# hard and symbolic links, devices, folders and pipes have no data, whatever size they claim
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6", b"V")


@dataclass(frozen=True)
class Fault:
    """Something unreadable, skipped and counted: a kind in a few fixed words, and where it is."""

    kind: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        # paths and members are named by whoever made the data
        return printable_line(f"{self.kind}: {self.place}")

    @property
    def place(self) -> str:
        """Where it is, with the detail."""
        return f"{self.where} ({self.detail})" if self.detail else self.where


@dataclass
class ShardIndex:
    """Samples of one shard in file order.

    samples: (key, {extension: (offset, bytes)}) with an image and every required extension.
    faults: the first 10,000 of each kind. counts: how many of each kind there are.
    """

    samples: list[tuple[str, dict[str, tuple[int, int]]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add_fault(self, kind: str, where: str, detail: str = "") -> None:
        """Count a fault and keep it while there is room."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_PLACES:
            self.faults.append(Fault(kind, where, detail))


def index_shard(path: Path, required: tuple[str, ...] = ()) -> ShardIndex:
    """`index_file` of a file by its path.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        return index_file(file, str(path), required)


def index_file(file: BinaryIO, name: str, required: tuple[str, ...] = ()) -> ShardIndex:
    """Read the headers of a tar and group its members into samples.

    A sample is the members with one name up to the first dot of the basename; names that begin
    with two underscores are metadata and skipped. Names are labels, never paths that anything
    is read from or written to; in them, bytes that are not UTF-8 and characters that cannot be
    printed are spelled as in Python's texts. Links, devices and other special members are never
    followed, and nothing is unpacked.

    Time and memory grow with the number of members, not with any size that a header claims.

    Args:
        file: an uncompressed tar, open: V7, POSIX (ustar and pax) or GNU.
        name: says in faults what it is.
        required: extensions, besides an image, without which a sample is a fault.

    Raises:
        OSError: the file cannot be read. Whatever is wrong inside is a `Fault` in the result.
    """
    index = ShardIndex()
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        _add_members(_Members(file.fileno(), name, index), groups)
    except OSError as error:
        # the system's message names no file
        raise OSError(error.errno, error.strerror, name) from error
    for key, files in groups.items():
        missing = [extension for extension in required if extension not in files]
        if not any(extension in files for extension in IMAGE_EXTENSIONS):
            missing.insert(0, "image")
        if missing:
            index.add_fault(f"sample without {missing[0]}", f"{name}:{key}")
        else:
            index.samples.append((key, files))
    return index


def dali_line(key: str, files: dict[str, tuple[int, int]]) -> str:
    """A sample in the index of DALI's webdataset reader: extension, offset, bytes and name of each.

    Blanks, which separate them, become underscores in names; members without data are left out.
    """
    return " ".join(
        f"{extension} {offset} {size} {key.replace(' ', '_')}.{extension}"
        for extension, (offset, size) in files.items()
        if size and " " not in extension
    )


def _add_members(members: "_Members", groups: dict[str, dict[str, tuple[int, int]]]) -> None:
    """Group members by key and extension."""
    extensions: dict[str, str] = {}
    for member in members:
        folder, slash, basename = member.name.rpartition("/")
        stem, dot, extension = basename.partition(".")
        if basename.startswith("__") or not dot or not stem:
            continue
        where = f"{members.shard}:{member.name}"
        extension = extension.lower()
        files = groups.setdefault(folder + slash + stem, {})
        if member.size > MAX_MEMBER_BYTES:
            members.index.add_fault("member too large", where, f"{member.size:,} bytes")
        elif extension in files:
            members.index.add_fault("duplicate member", where)
        else:
            # one text for the same extension of all samples
            files[extensions.setdefault(extension, extension)] = (member.offset, member.size)


class _Header(NamedTuple):
    kind: bytes
    name: str
    size: int


class _Member(NamedTuple):
    """A regular file: `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


@dataclass
class _Announced:
    """What extended headers say of the member that follows them."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    # the kind of fault that makes the member's name or size unknown
    fault: str = ""

    def apply(self, records: dict[bytes, bytes]) -> None:
        """Take what the records of a pax header say; an empty value says nothing."""
        if name := records.get(b"GNU.sparse.name") or records.get(b"path"):
            if len(name) > MAX_NAME_BYTES:
                self.fault = "name too long"
            else:
                # here it would not end the name
                self.name = _name(name.replace(b"\0", b"\\x00"))
        if size := records.get(b"size"):
            if _DECIMAL.fullmatch(size):
                self.size = int(size)
            else:
                self.fault = "damaged header"
        self.sparse |= any(key.startswith(b"GNU.sparse.") for key in records)


class _Members:
    """The regular files of a tar in order; what else it holds goes to `index` as faults."""

    def __init__(self, descriptor: int, shard: str, index: ShardIndex) -> None:
        self.descriptor = descriptor
        self.shard = shard
        self.index = index
        self.bytes = os.fstat(descriptor).st_size

    def __iter__(self) -> Iterator[_Member]:
        offset = members = 0
        announced: _Announced | None = None
        while members < MAX_MEMBERS:
            block = os.pread(self.descriptor, _BLOCK, offset)
            header = self._header(block, offset)
            if header is None:
                # where the archive breaks off, that has been reported
                if announced is not None and not block.strip(b"\0"):
                    self._fault("damaged header", "an extended header without a member")
                return
            data = offset + _BLOCK
            if header.kind in _EXTENDED:
                if data + header.size > self.bytes:
                    detail = f"an extended header of {header.size:,} bytes at byte {offset:,}"
                    self._fault("cut inside a header", detail)
                    return
                members += 1
                announced = self._extended(header, data, announced)
                offset = data + _padded(header.size)
                continue
            name, size = header.name, header.size
            known, announced = announced or _Announced(), None
            if known.name is not None:
                name = known.name
            members += 1 + len(name) // 256
            if header.kind in _WITHOUT_DATA:
                size = 0
            elif known.size is not None:
                size = known.size
            if header.kind == b"S" and block[482]:
                data = self._after_sparse_map(data)
            if data + size > self.bytes:
                detail = f"claims {size:,} bytes at byte {data:,} of {self.bytes:,}, rest unread"
                self.index.add_fault("cut inside a member", f"{self.shard}:{name}", detail)
                return
            offset = data + _padded(size)
            if known.fault:
                self.index.add_fault(known.fault, f"{self.shard}:{name}")
            elif header.kind in _FILES and not known.sparse:
                yield _Member(name, data, size)
            elif header.kind not in (b"5", b"D", b"V"):
                self.index.add_fault("link or special member", f"{self.shard}:{name}")
        self._fault("too many members", f"{MAX_MEMBERS:,} read, the rest unread; cut the shard up")

    def _fault(self, kind: str, detail: str) -> None:
        self.index.add_fault(kind, self.shard, detail)

    def _header(self, block: bytes, offset: int) -> _Header | None:
        """The header in `block`; None, with the fault noted, where the archive ends or is bad."""
        if block == _ZEROS:
            if offset == 0:
                self._fault("no members", "it begins with zeros")
            self._look_behind(offset + _BLOCK)
            return None
        try:
            if len(block) == _BLOCK:
                return _parse(block)
            problem = "cut inside a header"
        except ValueError as error:
            problem = str(error)
        if offset == 0:
            self._report_no_tar(block, problem)
        elif not block:
            self._fault("no end-of-archive mark", "the shard may have been cut")
        elif len(block) < _BLOCK:
            self._fault(problem, f"at byte {offset:,} of {self.bytes:,}")
        else:
            detail = f"{problem} at byte {offset:,} of {self.bytes:,}, rest unread"
            self._fault("damaged header", detail)
        return None

    def _report_no_tar(self, start: bytes, problem: str) -> None:
        form = next((_COMPRESSED[magic] for magic in _COMPRESSED if start.startswith(magic)), None)
        if form:
            self._fault("compressed shard", f"{form}; unpack it, images are compressed already")
        elif start:
            self._fault("not a tar", f"{problem}; it begins with {start[:16]!r}")
        else:
            self._fault("empty file", "")

    def _look_behind(self, end: int) -> None:
        """Report data behind the end-of-archive mark, such as a second archive's."""
        rest = os.pread(self.descriptor, _LOOK_BEHIND_END, end)
        behind = len(rest) - len(rest.lstrip(b"\0"))
        if behind < len(rest):
            self._fault("data behind the end", f"from byte {end + behind:,} on, unread")

    def _extended(
        self, header: _Header, data: int, announced: _Announced | None
    ) -> _Announced | None:
        """What is known of the next member after one more extended header."""
        records: dict[bytes, bytes] | None = None
        if header.kind in _PAX and header.size <= MAX_HEADER_BYTES:
            records = _records(os.pread(self.descriptor, header.size, data))
        if header.kind == b"g":
            # of all members that follow; POSIX allows it, and only mischief comes of it
            if records is None or records.keys() & {b"path", b"size"}:
                detail = "a global header that is too large, damaged or renames members; ignored"
                self.index.add_fault("damaged header", f"{self.shard}:{header.name}", detail)
            return announced
        known = announced or _Announced()
        if header.kind == b"L":
            if header.size > MAX_NAME_BYTES:
                known.fault = "name too long"
            else:
                known.name = _name(os.pread(self.descriptor, header.size, data))
        elif header.kind in _PAX:
            if header.size > MAX_HEADER_BYTES:
                known.fault = "header too large"
            elif records is None:
                known.fault = "damaged header"
            else:
                known.apply(records)
        return known

    def _after_sparse_map(self, offset: int) -> int:
        """The end of the blocks of GNU's old sparse format that begin at `offset`."""
        block = os.pread(self.descriptor, _BLOCK, offset)
        while len(block) == _BLOCK and block[504]:
            offset += _BLOCK
            block = os.pread(self.descriptor, _BLOCK, offset)
        return offset + _BLOCK


def _parse(block: bytes) -> _Header:
    """A header block.

    Raises:
        ValueError: its checksum or a number in it is wrong.
    """
    claimed = _number(block[148:156])
    # eight spaces stand for the checksum in its own sum
    actual = sum(block) - sum(block[148:156]) + 8 * 32
    if claimed != actual:
        # some old writers summed signed bytes
        outside = block[:148] + block[156:]
        if claimed != actual - 256 * sum(byte > 127 for byte in outside):
            raise ValueError("wrong checksum")
    kind = block[156:157]
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    # V7 had no kind of its own for folders
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"
    return _Header(kind, _name(name), _number(block[124:136]))


def _number(digits: bytes) -> int:
    """A header's number: octal, or GNU's and star's base 256 for large ones.

    Raises:
        ValueError: it is neither, or negative.
    """
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    octal = digits.partition(b"\0")[0].strip(b" ")
    if not _OCTAL.fullmatch(octal):
        raise ValueError(f"{digits!r} is not a number")
    return int(octal or b"0", 8)


def _name(encoded: bytes) -> str:
    """A name of a header as a text that can be printed."""
    name = encoded.partition(b"\0")[0].decode("utf-8", "backslashreplace")
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _records(content: bytes) -> dict[bytes, bytes] | None:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; None where it is not made of them."""
    records: dict[bytes, bytes] = {}
    position = 0
    # some writers fill the header up with zeros
    while position < len(content) and content[position]:
        space = content.find(b" ", position, position + 21)
        digits = content[position:space] if space > 0 else b""
        length = int(digits) if _DECIMAL.fullmatch(digits) else 0
        record = content[position : position + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < max(length, len(digits) + 1) or not equals or record[-1:] != b"\n":
            return None
        records[key] = value
        position += length
    return records
