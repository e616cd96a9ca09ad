"""The picture of a search: what stands beneath the images that were found."""

import numpy as np
import pytest
from PIL import Image

from fastclip.evaluate.gallery import Found, results_sheet

SIZE = 96


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
