"""One sample, and what makes one unusable."""

import io
from dataclasses import dataclass, field

from PIL import Image, UnidentifiedImageError

from fastclip.data.index import Fault

MAX_IMAGE_PIXELS = 25_000_000
MAX_TEXT_BYTES = 1 << 20


@dataclass
class Sample:
    """One image with its captions.

    Attributes:
        image: RGB; what the file's header says, without pixels, where it was not to be decoded.
        texts: the captions, where no source of them is asked for by name.
        label: the class index, where the data has one.
        encoded: the image file's own bytes, where there is a file.
        captions: the captions of each source that was asked for and is there, by its name.
        negatives: false captions that the data bring.
    """

    key: str
    image: Image.Image
    texts: tuple[str, ...]
    label: int | None = None
    encoded: bytes | None = None
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    negatives: tuple[str, ...] = ()


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
    return decode(open_image(encoded, where), where)


def decode(image: Image.Image, where: str) -> Image.Image:
    """The pixels of an opened image as RGB.

    Raises:
        UnreadableSample: the file is no whole image.
    """
    try:
        return image.convert("RGB")
    # Pillow raises more than OSError on damaged input, and the set changes with releases
    except Exception as error:
        raise UnreadableSample(Fault("corrupt image", where, str(error)[:80])) from error
