"""JPEG files for decoders that are faster than Pillow, with the same pixels.

One bad image ends DALI's run. So only JPEGs whose structure is whole reach it as they are; all else
(PNG, WebP, CMYK, JPEGs that hold RGB, damaged files, images made by the program) is decoded by
Pillow, as torchvision's pipeline does, and handed on as a PPM, which has no compression to be
damaged.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor

from fastclip.data.augment import AugmentationParams
from fastclip.data.complexity import START_OF_SCAN, jpeg_segments
from fastclip.data.samples import Sample, decode


def portable(sample: Sample) -> bytes | Image.Image:
    """The sample's file, where it is a whole JPEG of gray or YCbCr, else its pixels.

    Args:
        sample: its image opened but not decoded, or without a file.

    Raises:
        UnreadableSample: the file is not a whole image.
    """
    encoded = _plain_jpeg(sample)
    return _decoded(sample) if encoded is None or _holds_rgb(sample.image) else encoded


def decode_pixels(sample: Sample) -> Tensor:
    """The sample's image as (3, H, W) uint8 with channels innermost in memory.

    simplejpeg decodes whole JPEGs of 1 or 3 components, bitwise equal to Pillow and without its
    copies; Pillow all else, and where it finds damage.

    Args:
        sample: its image opened but not decoded, or without a file.

    Raises:
        UnreadableSample: the file is not a whole image.
    """
    encoded = _plain_jpeg(sample)
    if encoded is not None:
        with suppress(ValueError):
            return torch.from_numpy(decode_jpeg(encoded, strict=True)).permute(2, 0, 1)
    return as_tensor(_decoded(sample))


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8 with channels innermost in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _plain_jpeg(sample: Sample) -> bytes | None:
    """The image's file, where it is a whole JPEG of 1 or 3 components."""
    image, encoded = sample.image, sample.encoded
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    return encoded if plain and encoded is not None and is_whole_jpeg(encoded) else None


def _holds_rgb(image: Any) -> bool:
    """Whether a JPEG may hold RGB, which decoders on GPUs take for YCbCr."""
    names = bytes(layer[0] for layer in image.layer)
    return image.mode == "RGB" and (image.info.get("adobe_transform") == 0 or names == b"RGB")


def _decoded(sample: Sample) -> Image.Image:
    return sample.image if sample.encoded is None else decode(sample.image, sample.where)


def trim(
    image: Image.Image, draws: Sequence[AugmentationParams]
) -> tuple[bytes, list[AugmentationParams]]:
    """What views show of an RGB image as a PPM of 8 bits, and their parameters on that part.

    A PPM is large: what no view shows is left out.
    """
    left, top = min(draw.left for draw in draws), min(draw.top for draw in draws)
    right = max(draw.left + draw.width for draw in draws)
    bottom = max(draw.top + draw.height for draw in draws)
    part = image.crop((left, top, right, bottom))
    moved = [replace(draw, left=draw.left - left, top=draw.top - top) for draw in draws]
    return b"P6\n%d %d\n255\n" % part.size + part.tobytes(), moved


def is_whole_jpeg(encoded: bytes) -> bool:
    """Whether segments follow one another up to a scan, and an end-of-image mark comes after it.

    A file cut anywhere fails this; inside a scan any bits decode to something.
    """
    if encoded[:2] != b"\xff\xd8":
        return False
    before = 0
    for marker, start, end in jpeg_segments(encoded):
        if start != before:
            return False
        if marker == START_OF_SCAN:
            return end >= start + 4 and encoded.rfind(b"\xff\xd9", end) >= 0
        before = end
    return False
