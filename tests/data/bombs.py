"""Pictures whose pixels are few, and what stands before them is much."""

import struct

from PIL import Image

from tests.data.hostile import Picture, chunk, encoded

RED = Image.new("RGB", (16, 8), (255, 0, 0))
JPEG = encoded(RED, "JPEG")
PNG = encoded(RED, "PNG")
# of the start, and of the chunk IHDR
PNG_START = 33


def segment(marker: int, content: bytes = b"") -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def ifd(entries: int, size: int) -> bytes:
    """A directory of EXIF whose entries all ask for the same `size` bytes."""
    rows = (struct.pack("<HHII", number, 7, size, 0) for number in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + b"".join(rows)


def in_jpeg(content: bytes) -> bytes:
    """Put where the file's JFIF segment ends."""
    return JPEG[:20] + content + JPEG[20:]


def in_png(content: bytes) -> bytes:
    return PNG[:PNG_START] + content + PNG[PNG_START:]


def exif(entries: int, size: int, more: int) -> bytes:
    """A JPEG without JFIF, whose resolution is looked for in EXIF, of `more` further segments."""
    whole = segment(0xE1, b"Exif\0\0" + ifd(entries, size))
    whole += segment(0xE1, b"Exif\0\0" + bytes(65_000)) * more
    return JPEG[:2] + whole + JPEG[20:]


def bombs() -> dict[str, Picture]:
    """By name, with those beside them that are in bounds."""
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(65_000))
    icc = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000))
    tiny = chunk(b"quIx", b"")
    red = ((16, 8), (254, 0, 0))
    pure = ((16, 8), (255, 0, 0))
    excess = "image too complex"
    return {
        "JPEG of empty comments": Picture(in_jpeg(segment(0xFE) * 5000), fault=excess),
        "JPEG of empty APP15": Picture(in_jpeg(segment(0xEF) * 5000), fault=excess),
        "JPEG of restart markers": Picture(in_jpeg(b"\xff\xd0" * 5000), fault=excess),
        "JPEG of starts": Picture(b"\xff\xd8" * 5000 + JPEG, fault=excess),
        "JPEG of fill bytes": Picture(in_jpeg(b"\xff" * 5000), fault=excess),
        "JPEG of stuffed zeros": Picture(in_jpeg(b"\xff\x00" * 5000), fault=excess),
        "JPEG with 17 MB of comments": Picture(
            in_jpeg(segment(0xFE, bytes(65_000)) * 265), fault=excess
        ),
        "JPEG with 17 MB of XMP": Picture(in_jpeg(xmp * 265), fault=excess),
        "JPEG with 17 MB of profile": Picture(in_jpeg(icc * 265), fault=excess),
        "JPEG with EXIF of 200 segments": Picture(exif(5000, 12_000_000, 200), fault=excess),
        "JPEG with EXIF of three segments": Picture(exif(5000, 100_000, 2), fault=excess),
        "JPEG that ends in its comments": Picture(JPEG[:20] + segment(0xFE) * 5000, fault=excess),
        "JPEG with 9 MB of junk": Picture(in_jpeg(b"x" * 9_000_000), fault=excess),
        "JPEG that ends in junk": Picture(JPEG[:20] + b"x" * 9_000_000, fault=excess),
        "JPEG of markers without a length": Picture(in_jpeg(b"\xff\xf0" * 5000), fault=excess),
        "JPEG with a segment beyond its end": Picture(
            JPEG[:20] + segment(0xFE, b"x" * 99)[:50], fault="corrupt image"
        ),
        "JPEG with a segment of length 0": Picture(in_jpeg(b"\xff\xfe\0\0"), *red),
        "JPEG with a byte of junk": Picture(in_jpeg(b"x"), *red),
        "PNG of empty chunks": Picture(in_png(tiny * 20_000), fault=excess),
        "PNG of empty pixels": Picture(in_png(chunk(b"IDAT", b"") * 20_000), fault=excess),
        "PNG of texts": Picture(in_png(chunk(b"tEXt", b"a\0") * 20_000), fault=excess),
        "PNG of chunks behind its pixels": Picture(
            PNG[:-12] + tiny * 20_000 + PNG[-12:], fault=excess
        ),
        "PNG with a chunk beyond its end": Picture(
            PNG[:PNG_START] + struct.pack(">I", 1 << 30) + b"quIx", fault="corrupt image"
        ),
        "PNG with 2 MB of text": Picture(in_png(chunk(b"tEXt", b"a\0" + bytes(1 << 21))), *pure),
        "PNG with EXIF of 65,000 entries": Picture(
            in_png(chunk(b"eXIf", ifd(65_000, 700_000))), *pure
        ),
        "JPEG with 3000 comments": Picture(in_jpeg(segment(0xFE, b"x") * 3000), *red),
        "JPEG with 100 segments of XMP": Picture(in_jpeg(xmp * 100), *red),
        "JPEG with 60 kB of EXIF": Picture(exif(5000, 1000, 0), *red),
        "PNG of 10,000 chunks": Picture(in_png(tiny * 10_000), *pure),
    }
