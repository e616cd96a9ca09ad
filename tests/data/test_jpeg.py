"""Images for fast decoders: what passes as it is, and that its bits are Pillow's."""

import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastclip.data.augment import AugmentationParams
from fastclip.data.jpeg import as_tensor, decode_pixels, is_whole_jpeg, portable, trim
from fastclip.data.samples import Sample, UnreadableSample, decode_image, open_image
from fastclip.data.views import render_view
from tests.data.pipelines import encode, smooth_image


def sample_of(encoded: bytes) -> Sample:
    return Sample("a", open_image(encoded, "s.tar:a.jpg"), (), encoded=encoded, where="s.tar:a.jpg")


def test_real_photographs_have_pillows_bits(real_data: Path) -> None:
    for path in sorted((real_data / "coco_mini" / "val2017").glob("*.jpg")):
        encoded = path.read_bytes()
        pixels = decode_pixels(sample_of(encoded))
        assert torch.equal(pixels, as_tensor(decode_image(encoded, ""))), path.name
        assert portable(sample_of(encoded)) is encoded


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 30},
        {"quality": 100, "subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "progressive": True},
        {"optimize": True, "restart_marker_rows": 1},
    ],
    ids=["low", "444", "422", "progressive", "restarts"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_has_pillows_bits(mode: str, options: dict) -> None:
    # sides that are not a multiple of a block
    encoded = encode(smooth_image(0, width=67, height=41).convert(mode), **options)
    pixels = decode_pixels(sample_of(encoded))
    assert torch.equal(pixels, as_tensor(decode_image(encoded, "")))
    passed = portable(sample_of(encoded))
    if mode == "CMYK":
        # four components are decoded by Pillow, for all decoders alike
        assert isinstance(passed, Image.Image) and torch.equal(as_tensor(passed), pixels)
    else:
        assert passed is encoded


def test_a_jpeg_that_holds_rgb_is_not_left_to_decoders_that_take_it_for_ycbcr() -> None:
    marked = encode(smooth_image(0), keep_rgb=True)
    # by the names of its components alone
    start = marked.index(b"\xff\xee\0\x0eAdobe")
    for encoded in (marked, marked[:start] + marked[start + 16 :]):
        expected = as_tensor(decode_image(encoded, ""))
        assert (expected.float() - as_tensor(smooth_image(0)).float()).abs().mean() < 4
        assert torch.equal(decode_pixels(sample_of(encoded)), expected)
        passed = portable(sample_of(encoded))
        assert isinstance(passed, Image.Image) and torch.equal(as_tensor(passed), expected)


def test_damage_inside_a_scan_looks_as_pillow_shows_it() -> None:
    rng = random.Random(0)
    seen = 0
    for number in range(60):
        content = bytearray(encode(smooth_image(number)))
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(600, len(content) - 2)] = rng.randrange(256)
        encoded = bytes(content)
        try:
            expected = as_tensor(decode_image(encoded, ""))
        except UnreadableSample as error:
            with pytest.raises(UnreadableSample, match=error.fault.kind):
                decode_pixels(sample_of(encoded))
            continue
        seen += 1
        assert torch.equal(decode_pixels(sample_of(encoded)), expected)
    assert seen >= 20


def test_images_without_a_file() -> None:
    image = smooth_image(0)
    assert torch.equal(decode_pixels(Sample("a", image, ())), as_tensor(image))
    assert portable(Sample("a", image, ())) is image


def test_what_no_view_shows_is_left_out() -> None:
    image = smooth_image(0)
    draws = [AugmentationParams(20, 30, 15, 25), AugmentationParams(10, 40, 30, 20, flip=True)]
    encoded, moved = trim(image, draws)
    assert encoded.startswith(b"P6\n30 30\n255\n")
    part = as_tensor(Image.open(BytesIO(encoded)))
    for draw, shifted in zip(draws, moved, strict=True):
        assert torch.equal(render_view(part, shifted, 16), render_view(as_tensor(image), draw, 16))


@pytest.mark.parametrize("make", [portable, decode_pixels])
def test_what_is_no_whole_image_is_reported_with_its_place(
    make: Callable[[Sample], object],
) -> None:
    with pytest.raises(UnreadableSample, match=r"corrupt image: s.tar:a.jpg"):
        make(sample_of(encode(smooth_image(0))[:-200]))


@pytest.mark.parametrize(
    "content, whole",
    [
        (encode(smooth_image(0)), True),
        (encode(smooth_image(0), progressive=True), True),
        (encode(smooth_image(0)) + b"xyz", True),
        (encode(smooth_image(0))[:-2], False),
        (encode(smooth_image(0))[:30], False),
        (b"\xff\xd8\xff\xe0\x00\x01" + bytes(50), False),
        (b"\xff\xd8\xff\xfe\x00\x00" + encode(smooth_image(0))[2:], False),
        (b"\xff\xd8\xff\xd0x" + encode(smooth_image(0))[2:], False),
        (b"\xff\xd8" + b"\xff" * 100_000, False),
        (b"", False),
    ],
    ids=[
        *("jpeg", "progressive", "trailing", "no end", "header"),
        *("length", "length 0", "junk", "fill", "empty"),
    ],
)
def test_whole_jpegs(content: bytes, whole: bool) -> None:
    assert is_whole_jpeg(content) is whole


def test_an_end_mark_of_a_thumbnail_is_not_the_images() -> None:
    thumbnail = encode(smooth_image(3, 16, 12))
    image = encode(smooth_image(0), exif=b"Exif\0\0" + thumbnail)
    assert is_whole_jpeg(image)
    assert b"\xff\xd9" in image[:-100] and not is_whole_jpeg(image[:-100])
