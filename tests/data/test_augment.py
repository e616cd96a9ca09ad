"""Augmentation: parameters within bounds, reproducible, and what torchvision makes of them."""

import random
from collections import Counter

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from fastclip.data.augment import Augmentation, View, apply_view, draw_view


def photograph() -> Image.Image:
    noise = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0))
    return tv.to_pil_image(noise.to(torch.uint8))


def test_draws_stay_within_their_ranges() -> None:
    augmentation = Augmentation(16, scale=(0.3, 0.8), flip=0.25)
    flips = Counter()
    for seed in range(2000):
        view = draw_view(augmentation, 60, 40, random.Random(seed))
        assert 0 <= view.top and view.top + view.height <= 40
        assert 0 <= view.left and view.left + view.width <= 60
        # rounding to whole pixels moves area and ratio by up to half a pixel a side
        area = view.width * view.height / 2400
        assert 0.3 * 0.9 <= area <= 0.8 * 1.1
        assert 3 / 4 * 0.9 <= view.width / view.height <= 4 / 3 * 1.1
        flips[view.flip] += 1
    # four standard deviations of a binomial
    assert abs(flips[True] - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5


def test_a_strip_falls_back_to_its_centre() -> None:
    view = draw_view(Augmentation(16, scale=(1.0, 1.0)), 100, 1, random.Random(0))
    assert view == View(0, 49, 1, 1, flip=view.flip)


def test_the_same_random_state_gives_the_same_view() -> None:
    draws = [draw_view(Augmentation(8), 50, 50, random.Random(7)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_views_are_what_pillow_makes() -> None:
    image, view = photograph(), View(5, 10, 20, 30, flip=True)
    pixels = apply_view(image, view, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    expected = image.crop((10, 5, 40, 25)).resize((16, 16), Image.Resampling.BICUBIC)
    expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(pixels, tv.pil_to_tensor(expected))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": (0.0, 1.0)}, "crop scale"),
        ({"scale": (0.9, 0.5)}, "crop scale"),
        ({"ratio": (2.0, 1.0)}, "crop ratio"),
        ({"flip": 1.5}, "flip probability"),
    ],
)
def test_impossible_ranges(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(16, **options)
