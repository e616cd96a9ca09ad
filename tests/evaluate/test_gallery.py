"""The picture of a search: what was found, how it is framed, and what stands beneath."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.data.sources import FirstSamples, open_source
from fastclip.evaluate.features import embed_images
from fastclip.evaluate.gallery import Found, draw_retrieval, results_sheet
from tests.evaluate.planned import BLUE, GREEN, RED, WHITE, paint, planned_model

SIZE = 96
FRAME = (44, 160, 44)


def sheet(*captions: str) -> np.ndarray:
    found = [Found(Image.new("RGB", (8, 8), "white"), 0.25, caption=text) for text in captions]
    return np.asarray(results_sheet(["query"], [found], SIZE).convert("L")).astype(int)


def test_captions_stand_beneath_the_scores() -> None:
    bare, mixed = sheet("", ""), sheet("", "a red circle above a star")
    # two lines more, and where there are no captions none
    assert mixed.shape == (bare.shape[0] + 30, bare.shape[1])
    beneath = mixed[bare.shape[0] - 8 : -8]
    start = SIZE + SIZE // 2 + 3 * 8
    first, second = beneath[:, start : start + SIZE], beneath[:, start + SIZE + 8 :]
    assert (first == 255).all()
    # in both of its lines
    assert (second[:15] < 128).any() and (second[15:] < 128).any()
    # the rest is as without
    assert (mixed[: bare.shape[0] - 8] == bare[:-8]).all()


@pytest.mark.parametrize("caption", ["word " * 100, "x" * 500])
def test_long_captions_stay_beneath_their_image(caption: str) -> None:
    alone, beside = sheet(caption, ""), sheet("", "")
    assert alone.shape[0] == beside.shape[0] + 30
    start = SIZE + SIZE // 2 + 3 * 8
    beneath = alone[beside.shape[0] - 8 :]
    assert (beneath[:30, start : start + SIZE] < 128).sum() > 50
    assert (beneath[:, : start - 2] == 255).all() and (beneath[:, start + SIZE + 2 :] == 255).all()


def test_what_is_right_alone_is_framed() -> None:
    found = [Found(Image.new("RGB", (8, 8), "white"), 0.5, right=i == 1) for i in range(3)]
    pixels = np.asarray(results_sheet(["query"], [found], SIZE))
    left, top = SIZE + SIZE // 2 + 3 * 8 + SIZE + 8, 8
    expected = np.zeros(pixels.shape[:2], dtype=bool)
    expected[top - 3 : top + SIZE + 3, left - 3 : left + SIZE + 3] = True
    expected[top : top + SIZE, left : left + SIZE] = False
    assert np.array_equal((pixels == FRAME).all(axis=2), expected)


def test_what_texts_retrieve_is_drawn_in_the_order_of_the_scores(tmp_path: Path) -> None:
    colors = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    for name, color in colors.items():
        paint(tmp_path / "photos" / name / "0.png", color)
    model = planned_model({"a photo of a red.": (9, 3, 1), "a photo of a blue.": (1, 2, 9)})
    source = open_source(str(tmp_path / "photos"), split="val")
    images = embed_images(model, source)
    queries = ["a photo of a red.", "a photo of a blue."]
    draw_retrieval(tmp_path / "out.png", model, source, images, queries, per_query=4)
    # white is nearer to both than what they have less of: 13 and 12 by the root of 3
    orders = [["red", "white", "green", "blue"], ["blue", "white", "green", "red"]]
    with Image.open(tmp_path / "out.png") as sheet:
        for row, order in enumerate(orders):
            for place, name in enumerate(order):
                # a score and two lines of caption are below each
                left, top = 216 + 136 * place, 8 + (128 + 45 + 8) * row
                assert sheet.getpixel((left + 64, top + 64)) == colors[name]
                framed = sheet.getpixel((left - 2, top - 2)) == FRAME
                assert framed == (place == 0)
    with pytest.raises(ValueError, match="4 features of 3 samples: some were skipped"):
        draw_retrieval(tmp_path / "no.png", model, FirstSamples(source, 3), images, queries)
