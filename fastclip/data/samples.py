"""One sample, and what makes one unusable."""

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from fastclip.data.index import Fault

MAX_IMAGE_PIXELS = 25_000_000
MAX_TEXT_BYTES = 1 << 20


@dataclass
class Sample:
    """One image with its captions; label is the class index where the data has one.

    encoded: the image file's own bytes, where they are to be kept as they are.
    """

    key: str
    image: Image.Image
    texts: tuple[str, ...]
    label: int | None = None
    encoded: bytes | None = None


class UnreadableSample(Exception):
    """One sample cannot be used; the run goes on with another."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def open_image(encoded: bytes, where: str) -> Image.Image:
    """A JPEG, PNG or WebP image whose header was read but not its pixels.

    Raises:
        UnreadableSample: the bytes are no such image, or it has over 25 million pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError as error:
        detail = "no JPEG, PNG or WebP"
        raise UnreadableSample(Fault("corrupt image", where, detail)) from error
    # Pillow raises more than OSError on damaged input, and the set changes with releases
    except Exception as error:
        raise UnreadableSample(Fault("corrupt image", where, str(error)[:80])) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        detail = f"{image.width} x {image.height}"
        raise UnreadableSample(Fault("image too large", where, detail))
    return image


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """An RGB image from JPEG, PNG or WebP bytes.

    Raises:
        UnreadableSample: the bytes are no whole image, or it has over 25 million pixels.
    """
    image = open_image(encoded, where)
    try:
        return image.convert("RGB")
    except Exception as error:
        raise UnreadableSample(Fault("corrupt image", where, str(error)[:80])) from error
