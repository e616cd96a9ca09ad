"""The contact sheet."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from fastclip.cli import main
from fastclip.data.preview import CAPTION_LINES, contact_sheet, fitted_lines
from fastclip.data.scenes import render, sample_scene


def test_sheet_holds_every_image_and_grows_with_the_text() -> None:
    images = [render(sample_scene(seed), 64) for seed in range(5)]
    sheet = contact_sheet(images, ["a"] * 5, columns=2, size=64)
    assert sheet.width == 8 + 2 * (64 + 8)
    assert sheet.height > 3 * 64
    taller = contact_sheet(images, ["a caption of many words"] * 5, columns=2, size=64)
    assert taller.width == sheet.width and taller.height > sheet.height
    for index, (left, top) in enumerate([(8, 8), (80, 8)]):
        found = np.asarray(taller)[top : top + 64, left : left + 64]
        assert (found == np.asarray(images[index])).all()


def test_images_of_any_shape_are_fitted() -> None:
    sheet = np.asarray(contact_sheet([Image.new("RGB", (300, 100), "red")], ["wide"], size=60))
    assert (sheet[8:28, 8:68] == (255, 0, 0)).all() and (sheet[30, 8:68] == 255).all()


@pytest.mark.parametrize("caption", ["word " * 200_000, "x" * 1_000_000], ids=["words", "letters"])
def test_a_long_caption_is_cut(caption: str) -> None:
    start = time.monotonic()
    sheet = contact_sheet([Image.new("RGB", (8, 8))], [caption], size=100)
    assert sheet.height == 8 + 100 + 4 + 14 * CAPTION_LINES + 8
    # to wrap all of it takes a minute
    assert time.monotonic() - start < 5


def test_what_is_skipped_is_reported(
    make_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    shard = make_shard("behind.tar", samples=2)
    with shard.open("ab") as file:
        file.write(b"<html>")
    assert main(["data", "preview", str(shard), "-o", str(sheet)]) == 0
    assert f"skipped data behind the end: {shard}" in " ".join(capsys.readouterr().err.split())
    shard = make_shard("bad.tar", [("a.jpg", b"no image"), ("a.txt", b"t")])
    assert main(["data", "preview", str(shard), "-o", str(sheet)]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"no sample of {shard} could be read: 1 corrupt image" in error


def test_mistakes() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="1 images and 0 captions"):
        contact_sheet([image], [])
    with pytest.raises(ValueError, match="columns is 0"):
        contact_sheet([image], ["a"], columns=0)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("a red circle", "circle"),
        ("many words " * 20, ("many...", "words...")),
        ("letters" * 40, "..."),
    ],
)
def test_a_long_text_ends_at_a_word(text: str, ends: str | tuple[str, ...]) -> None:
    font = ImageFont.load_default(11)
    lines = fitted_lines(text, font, 100, 2)
    assert len(lines) <= 2 and all(font.getlength(line) <= 100 for line in lines)
    assert lines[-1].endswith(ends)
    assert text.startswith("".join(lines).removesuffix("...")[:12])
