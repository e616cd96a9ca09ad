"""How much there is to parse in an image file, found before a decoder in Python parses it."""

import struct
from collections.abc import Iterator

# A camera's JPEG has some 20 segments before its pixels, a phone's with a depth map some 200.
MAX_JPEG_MARKERS = 4096
MAX_JPEG_HEADER = 8 << 20
# One segment of EXIF holds 64 KiB; each of its entries may ask for all of it.
MAX_EXIF = 128 << 10
# Of 64 MiB, as large as an image file may be, in pieces of 8 KiB, as encoders make them.
MAX_PNG_CHUNKS = 1 << 14

START_OF_SCAN = 0xDA
_APP1 = 0xE1
# markers that no length follows: fill, start, end, restarts, a stuffed zero, and reserved ones
_BARE = frozenset((0x00, 0x01, 0xC8, 0xFF, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))


def too_complex(encoded: bytes) -> str:
    """What there is too much of in a JPEG or PNG file; empty where all is in bounds."""
    if encoded.startswith(b"\xff\xd8"):
        return _jpeg(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(encoded)
    return ""


def jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """The markers of a JPEG up to its first scan, with where each segment starts and ends.

    They are found as Pillow finds them: bytes that begin no marker are passed over, and the two
    bytes of a length are read whatever it says. In a whole file each segment starts where the one
    before ends.
    """
    start = encoded.find(b"\xff")
    while 0 <= start <= len(encoded) - 4:
        marker = encoded[start + 1]
        if marker in _BARE:
            # a fill byte may begin the next marker, a zero does not
            end = least = start + (1 if marker == 0xFF else 2)
        else:
            end = start + 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
            least = start + 4
        yield marker, start, end
        if marker == START_OF_SCAN:
            return
        start = encoded.find(b"\xff", max(end, least))


def _jpeg(encoded: bytes) -> str:
    header, exif = len(encoded), 0
    for count, (marker, start, end) in enumerate(jpeg_segments(encoded)):
        if count == MAX_JPEG_MARKERS:
            return f"over {MAX_JPEG_MARKERS:,} markers"
        if marker == START_OF_SCAN:
            header = start
        elif marker == _APP1 and encoded.startswith(b"Exif\0", start + 4):
            exif += end - start
    if exif > MAX_EXIF:
        return f"{exif:,} bytes of EXIF"
    return f"{header:,} bytes of header" if header > MAX_JPEG_HEADER else ""


def _png(encoded: bytes) -> str:
    place = 8
    for _ in range(MAX_PNG_CHUNKS):
        if place + 8 > len(encoded):
            return ""
        place += 12 + struct.unpack_from(">I", encoded, place)[0]
    return f"over {MAX_PNG_CHUNKS:,} chunks"
