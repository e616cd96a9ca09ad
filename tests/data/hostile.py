"""Tars and images that are damaged or made to do harm, with what must come of each."""

import bz2
import gzip
import io
import lzma
import struct
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import jpeg

END = bytes(1024)
JPEG = jpeg((200, 30, 30), 16)

# numbers in pieces stand for so many zero bytes, which are left as a hole in the file
Piece = bytes | int


@dataclass(frozen=True)
class Tar:
    """A tar: what it is made of, and what an index and a reader make of it.

    Attributes:
        keys: of the samples that are kept; their text is "about KEY" where nothing else is said.
        faults: (kind, member) of each in order, the member empty where the shard itself is meant.
        unreadable: the kind of fault of samples that are kept but cannot be read, by key.
    """

    pieces: tuple[Piece, ...]
    keys: tuple[str, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it; zeros given by their number take no room on the disk."""
        with path.open("wb") as file:
            for piece in self.pieces:
                if isinstance(piece, int):
                    file.seek(piece, io.SEEK_CUR)
                else:
                    file.write(piece)
            file.truncate(file.tell())


def forget_peak() -> None:
    """Have `peak_mebibytes` begin anew; skips the test where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system cannot forget a process's peak of memory")


def peak_mebibytes() -> float:
    """The most memory that this process had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def header(
    name: bytes,
    size: int | bytes,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    changes: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """A header block with a right checksum; `changes` are bytes to put at an offset before."""
    block = bytearray(512)
    fields = [
        (0, name[:100]),
        (100, b"0000644\0"),
        (124, size if isinstance(size, bytes) else b"%011o\0" % size),
        (136, b"00000000000\0"),
        (148, b" " * 8),
        (156, kind),
        (157, link),
        (257, magic),
        (345, prefix),
        *changes,
    ]
    for offset, content in fields:
        block[offset : offset + len(content)] = content
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str | bytes, content: bytes, kind: bytes = b"0") -> bytes:
    """A member with its data, filled up to whole blocks."""
    encoded = name.encode() if isinstance(name, str) else name
    return header(encoded, len(content), kind) + content + bytes(-len(content) % 512)


def sample(key: str | bytes, text: bytes | None = None, image: bytes = JPEG) -> bytes:
    """KEY.jpg and KEY.txt."""
    name = key.encode() if isinstance(key, str) else key
    text = b"about " + name if text is None else text
    return member(name + b".jpg", image) + member(name + b".txt", text)


def record(key: str, value: bytes) -> bytes:
    """A record of a pax header, whose length counts its own digits."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def pax(*records: tuple[str, bytes], kind: bytes = b"x") -> bytes:
    """An extended header."""
    return member("PaxHeader", b"".join(record(*each) for each in records), kind)


def with_txt(key: str, before: bytes, name: bytes = b"short.txt") -> bytes:
    """A sample whose text's name comes in what is put before its header."""
    return member(f"{key}.jpg", JPEG) + before + member(name, b"about " + key.encode())


def chunk(kind: bytes, content: bytes) -> bytes:
    """One of a PNG's chunks."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width: int, height: int, rows: bytes, *extra: bytes, color: int = 2) -> bytes:
    """An 8-bit PNG from its compressed rows, with further chunks before them."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    body = start + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@lru_cache
def bomb(count: int) -> bytes:
    """So many zero bytes, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    pieces = [packer.compress(bytes(min(1 << 20, count - at))) for at in range(0, count, 1 << 20)]
    return b"".join([*pieces, packer.flush()])


PADDED = JPEG + bytes(-len(JPEG) % 512)
A, B, C = sample("a"), sample("b"), sample("c")
FIRST_SIZE = 512 + len(PADDED)
SPARSE = (("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"b.jpg"))
LONG = "d/" + "n" * 300


def signed_checksum(block: bytes) -> bytes:
    """A member's header with its checksum as some old writers counted it."""
    blank = block[:148] + b" " * 8 + block[156:512]
    total = sum(byte - 256 if byte > 127 else byte for byte in blank)
    return block[:148] + b"%06o\0 " % total + block[156:]


def damaged(content: bytes, offset: int, to: bytes) -> bytes:
    """Bytes with some of them replaced."""
    return content[:offset] + to + content[offset + len(to) :]


def tiny_members(count: int) -> bytes:
    """So many empty members of `count` / 2 samples."""
    blank = bytearray(header(b"000000.jpg", 0))
    rest = sum(header(b"", 0)[:148]) + sum(blank[156:])
    blocks = []
    for number in range(count // 2):
        for extension in (b"jpg", b"txt"):
            name = b"%06d.%s" % (number, extension)
            blank[:10] = name
            blank[148:156] = b"%06o\0 " % (sum(name) + 8 * 32 + rest)
            blocks.append(bytes(blank))
    return b"".join(blocks)


def deep_json(depth: int) -> bytes:
    """Lists inside lists."""
    return b'{"captions": ' + b"[" * depth


@lru_cache
def tars() -> dict[str, Tar]:
    """All of them by name; built when asked for, since they take memory."""
    return {
        "whole": Tar((A, B, END), ("a", "b")),
        # what is cut off or not there
        "zero bytes": Tar((), (), (("empty file", ""),)),
        "one byte": Tar((b"a",), (), (("not a tar", ""),)),
        "all zeros": Tar((10240,), (), (("no members", ""),)),
        "cut in the first header": Tar((A[:300],), (), (("not a tar", ""),)),
        "cut in a header": Tar((A, B[:300]), ("a",), (("cut inside a header", ""),)),
        "cut in the data of an image": Tar(
            (A, B[:700]), ("a",), (("cut inside a member", "b.jpg"),)
        ),
        "cut in the data of a text": Tar(
            (A, B[: FIRST_SIZE + 514]),
            ("a",),
            (("cut inside a member", "b.txt"), ("sample without txt", "b")),
        ),
        "cut in what is no sample": Tar(
            (A, header(b"README", 5000), b"x" * 100), ("a",), (("cut inside a member", "README"),)
        ),
        "no end blocks": Tar((A, B), ("a", "b"), (("no end-of-archive mark", ""),)),
        "one end block": Tar((A, B, bytes(512)), ("a", "b")),
        "half an end block": Tar((A, bytes(100)), ("a",), (("cut inside a header", ""),)),
        "long zeros at the end": Tar((A, 1 << 30), ("a",)),
        # what is not a tar, or more than one
        "HTML page": Tar((b"<!DOCTYPE html>" * 200,), (), (("not a tar", ""),)),
        "HTML behind the end": Tar((A, END, b"<html>"), ("a",), (("data behind the end", ""),)),
        "two tars in one file": Tar((A, END, B, END), ("a",), (("data behind the end", ""),)),
        "a tar inside": Tar((A, member("a.tar", B + END), END), ("a",)),
        "gz": Tar((gzip.compress(A + END),), (), (("compressed shard", ""),)),
        "bz2": Tar((bz2.compress(A + END),), (), (("compressed shard", ""),)),
        "xz": Tar((lzma.compress(A + END),), (), (("compressed shard", ""),)),
        "zstd": Tar((b"\x28\xb5\x2f\xfd" + bytes(600),), (), (("compressed shard", ""),)),
        "names that begin like bzip2's": Tar((sample("BZh1"), END), ("BZh1",)),
        "gz bomb": Tar((gzip.compress(bytes(1 << 24)),), (), (("compressed shard", ""),)),
        # headers
        "bad checksum": Tar((A, damaged(B, 3, b"x"), C, END), ("a",), (("damaged header", ""),)),
        "signed checksum": Tar(
            (A, member("é.jpg", JPEG), signed_checksum(member("é.txt", b"about \xc3\xa9")), END),
            ("a", "é"),
        ),
        "10 GB claimed": Tar(
            (A, header(b"b.jpg", 10_000_000_000 % 8**11), JPEG, END),
            ("a",),
            (("cut inside a member", "b.jpg"),),
        ),
        "base-256 size": Tar(
            (
                A,
                header(b"b.jpg", b"\x80" + len(JPEG).to_bytes(11, "big")),
                PADDED,
                member("b.txt", b"about b"),
                END,
            ),
            ("a", "b"),
        ),
        "base-256 size of 2^80": Tar(
            (A, header(b"b.jpg", b"\x80" + (1 << 80).to_bytes(11, "big")), JPEG, END),
            ("a",),
            (("cut inside a member", "b.jpg"),),
        ),
        "base-256 negative size": Tar(
            (A, header(b"b.jpg", b"\xff" * 11 + b"\x00"), JPEG, END),
            ("a",),
            (("damaged header", ""),),
        ),
        "negative size": Tar(
            (A, header(b"b.jpg", b"-0000001000\0"), JPEG, END), ("a",), (("damaged header", ""),)
        ),
        "size that is not a number": Tar(
            (A, header(b"b.jpg", b"12 34 zz\0"), JPEG, END), ("a",), (("damaged header", ""),)
        ),
        "size with an underscore": Tar(
            (A, header(b"b.jpg", b"1_0\0"), JPEG, END), ("a",), (("damaged header", ""),)
        ),
        "blank size": Tar(
            (A, header(b"b.jpg", bytes(12)), member("b.txt", b"about b"), END),
            ("a", "b"),
            (),
            {"b": "corrupt image"},
        ),
        "garbage in fields nobody needs": Tar(
            (
                A,
                header(b"b.jpg", len(JPEG), changes=((100, b"\xfe" * 24), (136, b"zz"))),
                PADDED,
                member("b.txt", b"about b"),
                END,
            ),
            ("a", "b"),
        ),
        "member of 64 MiB and a byte": Tar(
            (A, header(b"b.jpg", (64 << 20) + 1), (64 << 20) + 512, member("b.txt", b"t"), C, END),
            ("a", "c"),
            (("member too large", "b.jpg"), ("sample without image", "b")),
        ),
        "unknown kind": Tar(
            (A, member("b.jpg", JPEG, b"Z"), C, END),
            ("a", "c"),
            (("link or special member", "b.jpg"),),
        ),
        "volume label": Tar((header(b"label", 0, b"V"), A, END), ("a",)),
        # names
        "duplicate name": Tar(
            (A, member("a.txt", b"second"), END), ("a",), (("duplicate member", "a.txt"),)
        ),
        "duplicate name, other case": Tar(
            (A, member("a.TXT", b"second"), END), ("a",), (("duplicate member", "a.TXT"),)
        ),
        "members of a sample apart": Tar(
            (member("a.jpg", JPEG), B, member("a.txt", b"about a"), END), ("a", "b")
        ),
        "absolute name": Tar((sample("/etc/a"), END), ("/etc/a",)),
        "name with ..": Tar((sample("../../a"), END), ("../../a",)),
        "name that is not UTF-8": Tar((sample(b"\xff", b"about \\xff"), END), ("\\xff",)),
        "name that clears a screen": Tar(
            (sample(b"\x1b[2J", b"about \\x1b[2J"), END), ("\\x1b[2J",)
        ),
        "zero byte in a name": Tar((A, header(b"b\0.jpg", len(JPEG)), PADDED, END), ("a",)),
        "zero byte in a long name": Tar(
            (
                pax(("path", b"b\0.jpg")),
                member("x", JPEG),
                member("b\\x00.txt", b"about b\\x00"),
                END,
            ),
            ("b\\x00",),
        ),
        "name of the prefix": Tar(
            (
                header(b"a.jpg", len(JPEG), prefix=b"long"),
                PADDED,
                member("long/a.txt", b"about long/a"),
                END,
            ),
            ("long/a",),
        ),
        "GNU times where the prefix is": Tar(
            (
                header(b"a.jpg", len(JPEG), prefix=b"14000000000\0", magic=b"ustar  \0"),
                PADDED,
                member("a.txt", b"about a"),
                END,
            ),
            ("a",),
        ),
        "GNU long name": Tar(
            (
                with_txt(
                    "d/" + "n" * 90, member("././@LongLink", b"d/" + b"n" * 90 + b".txt\0", b"L")
                ),
                END,
            ),
            ("d/" + "n" * 90,),
        ),
        "GNU long name of 10 MB": Tar(
            (A, header(b"././@LongLink", 10_000_000, b"L"), b"b" * 10_000_384, B, C, END),
            ("a", "c"),
            (("name too long", "b.jpg"), ("sample without image", "b")),
        ),
        "GNU long link of 10 MB": Tar(
            (A, header(b"././@LongLink", 10_000_000, b"K"), b"b" * 10_000_384, B, END), ("a", "b")
        ),
        # extended headers
        "pax name": Tar(
            (
                pax(("path", LONG.encode() + b".jpg")),
                member("x", JPEG),
                pax(("path", LONG.encode() + b".txt")),
                member("y", b"about " + LONG.encode()),
                END,
            ),
            (LONG,),
        ),
        "pax name of another member": Tar(
            (A, pax(("path", b"a.txt")), member("b.txt", b"stolen"), END),
            ("a",),
            (("duplicate member", "a.txt"),),
        ),
        "pax name of 5,000 bytes": Tar(
            (A, pax(("path", b"n" * 5000)), B, C, END),
            ("a", "c"),
            (("name too long", "b.jpg"), ("sample without image", "b")),
        ),
        "pax size too large": Tar(
            (A, pax(("size", b"10000000000")), B, END), ("a",), (("cut inside a member", "b.jpg"),)
        ),
        "pax size too small": Tar(
            (A, pax(("size", b"3")), B, END),
            ("a",),
            (("damaged header", ""), ("sample without txt", "b")),
        ),
        "pax size that swallows the next member": Tar(
            (
                member("a.jpg", JPEG),
                pax(("size", b"1030")),
                member("a.txt", b"about a"),
                member("c.txt", b"about c"),
                B,
                END,
            ),
            ("a", "b"),
            (),
            {"a": "caption holds zero bytes"},
        ),
        "pax size that is not a number": Tar(
            (A, pax(("size", b"-5")), B, C, END),
            ("a", "c"),
            (("damaged header", "b.jpg"), ("sample without image", "b")),
        ),
        "pax size of 10,000 digits": Tar(
            (A, pax(("size", b"9" * 10_000)), B, C, END),
            ("a", "c"),
            (("damaged header", "b.jpg"), ("sample without image", "b")),
        ),
        "pax record that is none": Tar(
            (A, member("PaxHeader", b"99 path=b", b"x"), B, C, END),
            ("a", "c"),
            (("damaged header", "b.jpg"), ("sample without image", "b")),
        ),
        "pax record of length 0": Tar(
            (A, member("PaxHeader", b"0 path=b\n", b"x"), B, C, END),
            ("a", "c"),
            (("damaged header", "b.jpg"), ("sample without image", "b")),
        ),
        "pax header of 1 GB": Tar(
            (A, header(b"PaxHeader", 1 << 30, b"x"), 1 << 30, B, C, END),
            ("a", "c"),
            (("header too large", "b.jpg"), ("sample without image", "b")),
        ),
        "pax header of 1 GB, claimed": Tar(
            (A, header(b"PaxHeader", 1 << 30, b"x"), B, END), ("a",), (("cut inside a header", ""),)
        ),
        "20,000 pax headers in a row": Tar(
            (A, pax(("comment", b"x")) * 20_000, B, END), ("a", "b")
        ),
        "pax header without a member": Tar(
            (A, pax(("path", b"b.jpg")), END), ("a",), (("damaged header", ""),)
        ),
        "global header": Tar((pax(("comment", b"x" * 40), kind=b"g"), A, END), ("a",)),
        "global header that renames all": Tar(
            (pax(("path", b"same.jpg"), kind=b"g"), A, B, END),
            ("a", "b"),
            (("damaged header", "PaxHeader"),),
        ),
        # members that are not files
        "symbolic link": Tar(
            (A, member("b.jpg", JPEG), header(b"b.txt", 0, b"2", link=b"/etc/passwd"), END),
            ("a",),
            (("link or special member", "b.txt"), ("sample without txt", "b")),
        ),
        "hard link": Tar(
            (A, member("b.jpg", JPEG), header(b"b.txt", 7, b"1", link=b"a.txt"), C, END),
            ("a", "c"),
            (("link or special member", "b.txt"), ("sample without txt", "b")),
        ),
        "character device": Tar(
            (A, header(b"b.jpg", 1000, b"3"), C, END),
            ("a", "c"),
            (("link or special member", "b.jpg"),),
        ),
        "block device": Tar(
            (A, header(b"b.jpg", 0, b"4"), C, END),
            ("a", "c"),
            (("link or special member", "b.jpg"),),
        ),
        "named pipe": Tar(
            (A, header(b"b.jpg", 0, b"6"), C, END),
            ("a", "c"),
            (("link or special member", "b.jpg"),),
        ),
        "folder named .jpg": Tar(
            (A, header(b"b.jpg", 0, b"5"), member("b.txt", b"t"), header(b"c.jpg/", 0, b"\0"), END),
            ("a",),
            (("sample without image", "b"),),
        ),
        "GNU sparse, old": Tar(
            (
                A,
                header(b"b.jpg", 512, b"S", changes=((482, b"\1"),)),
                bytes(504) + b"\1" + bytes(7),
                bytes(512),
                b"x" * 512,
                C,
                END,
            ),
            ("a", "c"),
            (("link or special member", "b.jpg"),),
        ),
        "GNU sparse, maps without end": Tar(
            (A, header(b"b.jpg", 512, b"S", changes=((482, b"\1"),)), b"\1" * (1 << 20)),
            ("a",),
            (("cut inside a member", "b.jpg"),),
        ),
        "GNU sparse in pax": Tar(
            (
                A,
                pax(*SPARSE, ("GNU.sparse.realsize", b"10000000000")),
                member("GNUSparseFile.0/b.jpg", b"1\n0\n0\n".ljust(512, b"\0")),
                C,
                END,
            ),
            ("a", "c"),
            (("link or special member", "b.jpg"),),
        ),
        # samples
        "key without text": Tar(
            (A, member("b.jpg", JPEG), END), ("a",), (("sample without txt", "b"),)
        ),
        "text without image": Tar(
            (A, member("b.txt", b"t"), END), ("a",), (("sample without image", "b"),)
        ),
        "empty caption": Tar((A, sample("b", b" \n"), END), ("a", "b"), (), {"b": "empty caption"}),
        "caption of 10 MB": Tar(
            (A, sample("b", b"x" * 10_000_000), END), ("a", "b"), (), {"b": "caption too long"}
        ),
        "caption that is not UTF-8": Tar(
            (A, sample("b", b"\xe9t\xe9"), END), ("a", "b"), (), {"b": "caption is not UTF-8"}
        ),
        "caption in UTF-16": Tar(
            (A, sample("b", "about b".encode("utf-16-le")), END),
            ("a", "b"),
            (),
            {"b": "caption holds zero bytes"},
        ),
        "JSON that is not a dictionary": Tar((A, member("a.json", b"[1]"), END), ("a",)),
        "deep JSON": Tar((A, member("a.json", deep_json(500_000)), END), ("a",)),
        "JSON with a number of 100,000 digits": Tar(
            (A, member("a.json", b'{"x": ' + b"9" * 100_000 + b"}"), END), ("a",)
        ),
        "class index that is none": Tar((A, B, member("b.cls", b"cat"), END), ("a", "b")),
        "class index of 10 MB": Tar((A, B, member("b.cls", b"9" * 10_000_000), END), ("a", "b")),
        "100,000 tiny members": Tar(
            (tiny_members(100_000), END),
            tuple(f"{number:06d}" for number in range(50_000)),
            (),
            {f"{number:06d}": "corrupt image" for number in range(50_000)},
        ),
    }


@dataclass(frozen=True)
class Picture:
    """An image file, and what comes of it.

    Attributes:
        size: (width, height) of the decoded image, None where it is refused.
        color: of its first pixel.
        fault: the kind, where it is refused.
    """

    content: bytes
    size: tuple[int, int] | None = None
    color: tuple[int, int, int] | None = None
    fault: str = ""


def refused(content: bytes, fault: str = "corrupt image") -> Picture:
    """A picture that is not to be had."""
    return Picture(content, fault=fault)


def frames(form: str) -> bytes:
    """An animation of a red and a blue frame."""
    red, blue = (Image.new("RGB", (16, 8), color) for color in ("red", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    return encoded(red, form, save_all=True, append_images=[blue], duration=100, **options)


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + b"\xff\xd9"


def oriented() -> bytes:
    """A JPEG of 16 x 8 pixels that asks to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (16, 8), "red"), "JPEG", exif=exif, quality=100)


def canvas(width: int, height: int) -> bytes:
    """A WebP that claims a larger canvas than its frame."""
    content = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", exif=b"Exif\0\0x"))
    content[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def deep_gray() -> bytes:
    """A 16-bit gray PNG of half brightness."""
    return encoded(Image.fromarray(np.full((8, 16), 0x80FF, np.uint16)), "PNG")


RED = Image.new("RGB", (16, 8), "red")
ROWS = zlib.compress((b"\0" + b"\xff\0\0" * 16) * 8)
REAL = partial(png, 16, 8, ROWS)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@lru_cache
def pictures() -> dict[str, Picture]:
    """All of them by name."""
    return {
        # what is cut, or no image
        "cut JPEG": refused(jpeg(size=256)[:-300]),
        "cut PNG": refused(REAL()[:-40]),
        "JPEG of its first bytes": refused(JPEG[:3]),
        "no bytes": refused(b""),
        "SVG": refused(SVG),
        "HTML": refused(b"<!DOCTYPE html><html><body>404</body></html>"),
        "EPS": refused(EPS),
        "TIFF": refused(encoded(RED, "TIFF")),
        "GIF, animated": refused(frames("GIF")),
        "BMP": refused(encoded(RED, "BMP")),
        "PNG of 0 x 0": refused(png(0, 0, ROWS)),
        "PNG of 0 x 8": refused(png(0, 8, ROWS)),
        "JPEG of 0 x 0": refused(damaged(JPEG, JPEG.index(b"\xff\xc0") + 5, bytes(4))),
        "PNG with a wrong checksum": refused(damaged(REAL(), 29, b"xxxx")),
        # what would take too much memory or time
        "PNG of 6000 x 6000": refused(png(6000, 6000, b""), "image too large"),
        "PNG of 30,000 x 30,000": refused(png(30_000, 30_000, b""), "image too large"),
        "PNG of 2^31 x 2^31": refused(png(2**31 - 1, 2**31 - 1, b""), "image too large"),
        "JPEG of 65,500 x 65,500": refused(
            damaged(JPEG, JPEG.index(b"\xff\xc0") + 5, b"\xff\xdc\xff\xdc"), "image too large"
        ),
        "WebP of 16,383 x 16,383": refused(canvas(16_383, 16_383), "image too large"),
        "PNG of 16 x 8 with 300 MB of rows": Picture(
            png(16, 8, bomb(300_000_000)), (16, 8), (0, 0, 0)
        ),
        "PNG with 300 MB of color profile": refused(
            REAL(chunk(b"iCCP", b"x\0\0" + bomb(300_000_000)))
        ),
        "PNG with 300 MB of text": refused(REAL(chunk(b"zTXt", b"x\0\0" + bomb(300_000_000)))),
        "PNG with 300 MB of UTF-8": refused(
            REAL(chunk(b"iTXt", b"x\0\1\0\0\0" + bomb(300_000_000)))
        ),
        "PNG with 100 MB in 100 texts": refused(
            REAL(chunk(b"zTXt", b"x\0\0" + bomb(1_000_000)) * 100)
        ),
        "JPEG of 5,000 scans": refused(many_scans(2000, 5000), "image too complex"),
        "PNG of 25,000,000 x 1": refused(
            png(25_000_000, 1, bomb(25_000_001), color=0), "image too narrow"
        ),
        "PNG of 101 x 1": refused(encoded(Image.new("RGB", (101, 1)), "PNG"), "image too narrow"),
        # what is odd and good
        "PNG of 1 x 100": Picture(
            encoded(Image.new("RGB", (1, 100), "red"), "PNG"), (1, 100), (255, 0, 0)
        ),
        "PNG of 1 x 1": Picture(
            encoded(Image.new("RGB", (1, 1), "red"), "PNG"), (1, 1), (255, 0, 0)
        ),
        "WebP named .jpg": Picture(encoded(RED, "WEBP", lossless=True), (16, 8), (255, 0, 0)),
        "JPEG with garbage behind its end": Picture(oriented() + b"x" * 1000, (16, 8), (254, 0, 0)),
        "JPEG with EXIF rotation": Picture(oriented(), (16, 8), (254, 0, 0)),
        "JPEG of two pictures": Picture(
            encoded(RED, "MPO", save_all=True, append_images=[RED], quality=100),
            (16, 8),
            (254, 0, 0),
        ),
        "JPEG of ten scans": Picture(many_scans(64, 5), (64, 64), (128, 128, 128)),
        "CMYK": Picture(
            encoded(Image.new("CMYK", (16, 8), (0, 255, 255, 0)), "JPEG", quality=100),
            (16, 8),
            (255, 0, 0),
        ),
        "16-bit gray": Picture(deep_gray(), (16, 8), (128, 128, 128)),
        "palette with transparency": Picture(
            encoded(RED.convert("P"), "PNG", transparency=bytes(range(256))), (16, 8), (255, 0, 0)
        ),
        "gray with transparency": Picture(
            encoded(Image.new("LA", (16, 8), (100, 0)), "PNG"), (16, 8), (100, 100, 100)
        ),
        "red, wholly transparent": Picture(
            encoded(Image.new("RGBA", (16, 8), (255, 0, 0, 0)), "PNG"), (16, 8), (255, 0, 0)
        ),
        "1 bit": Picture(encoded(Image.new("1", (16, 8), 1), "PNG"), (16, 8), (255, 255, 255)),
        "PNG, animated": Picture(frames("PNG"), (16, 8), (255, 0, 0)),
        "WebP, animated": Picture(frames("WEBP"), (16, 8), (255, 0, 0)),
    }
