"""How much there is to parse in an image file, found before a decoder in Python parses it."""

import struct

# A camera's JPEG has some 20 segments before its pixels, a phone's with a depth map some 200.
MAX_JPEG_MARKERS = 4096
MAX_JPEG_HEADER = 8 << 20
# One segment of EXIF holds 64 KiB; each of its entries may ask for all of it.
MAX_EXIF = 128 << 10
# Of 64 MiB, as large as an image file may be, in pieces of 8 KiB, as encoders make them.
MAX_PNG_CHUNKS = 1 << 14

_START_OF_SCAN = 0xDA
_APP1 = 0xE1
# markers that no length follows: fill, start, end, restarts, and a stuffed zero
_BARE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xDA)))


def too_complex(encoded: bytes) -> str:
    """What there is too much of in a JPEG or PNG file; empty where all is in bounds."""
    if encoded.startswith(b"\xff\xd8"):
        return _jpeg(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(encoded)
    return ""


def _jpeg(encoded: bytes) -> str:
    place = exif = 0
    last = len(encoded) - 4
    for _ in range(MAX_JPEG_MARKERS):
        if place > last or encoded[place] != 0xFF:
            return ""
        marker = encoded[place + 1]
        if marker == _START_OF_SCAN:
            break
        if marker in _BARE:
            # a fill byte may begin the next marker, a zero does not
            place += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(encoded[place + 2 : place + 4], "big")
        if marker == _APP1 and encoded.startswith(b"Exif\0", place + 4):
            exif += length
        place += 2 + length
    else:
        return f"over {MAX_JPEG_MARKERS:,} markers"
    if exif > MAX_EXIF:
        return f"{exif:,} bytes of EXIF"
    return f"{place:,} bytes of header" if place > MAX_JPEG_HEADER else ""


def _png(encoded: bytes) -> str:
    place = 8
    for _ in range(MAX_PNG_CHUNKS):
        if place + 8 > len(encoded):
            return ""
        place += 12 + struct.unpack_from(">I", encoded, place)[0]
    return f"over {MAX_PNG_CHUNKS:,} chunks"
