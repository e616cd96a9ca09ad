"""Augmentation: parameters within bounds, reproducible, and the vector that holds them."""

import random
from collections import Counter

import pytest
import torch

from fastclip.data.augment import (
    COLOR_STEPS,
    PARAM_NAMES,
    PARAMS,
    Augmentation,
    AugmentationParams,
    draw_view,
)

EVERYTHING = Augmentation(
    32, scale=(0.1, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5, solarize=0.3
)


def test_draws_stay_within_their_ranges() -> None:
    augmentation = Augmentation(16, scale=(0.3, 0.8), flip=0.25)
    for seed in range(2000):
        view = draw_view(augmentation, 60, 40, random.Random(seed))
        assert 0 <= view.top and view.top + view.height <= 40
        assert 0 <= view.left and view.left + view.width <= 60
        # rounding to whole pixels moves area and ratio by up to half a pixel a side
        area = view.width * view.height / 2400
        assert 0.3 * 0.9 <= area <= 0.8 * 1.1
        assert 3 / 4 * 0.9 <= view.width / view.height <= 4 / 3 * 1.1


def test_each_step_is_as_frequent_as_asked_for() -> None:
    draws = [draw_view(EVERYTHING, 60, 40, random.Random(seed)) for seed in range(4000)]
    found = {
        "flip": sum(draw.flip for draw in draws),
        "jitter": sum(draw.jitter for draw in draws),
        "gray": sum(draw.gray for draw in draws),
        "blur": sum(draw.sigma > 0 for draw in draws),
        "solarize": sum(draw.solarize < 256 for draw in draws),
    }
    for name, count in found.items():
        share = getattr(EVERYTHING, name)
        # four standard deviations of a binomial
        assert abs(count - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5, name
    orders = Counter(draw.order for draw in draws if draw.jitter)
    assert len(orders) == 24
    for draw in draws:
        factors = (draw.brightness, draw.contrast, draw.saturation)
        assert all(0.6 <= factor <= 1.4 for factor in factors) and abs(draw.hue) <= 0.1
        assert draw.sigma == 0 or 0.1 <= draw.sigma <= 2
        assert draw.jitter or (factors, draw.hue, draw.order) == ((1, 1, 1), 0, (0, 1, 2, 3))


def test_a_strip_falls_back_to_its_center() -> None:
    view = draw_view(Augmentation(16, scale=(1.0, 1.0)), 100, 1, random.Random(0))
    assert view == AugmentationParams(0, 49, 1, 1)


def test_the_same_random_state_gives_the_same_view() -> None:
    draws = [draw_view(EVERYTHING, 50, 50, random.Random(7)) for _ in range(2)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize("width, height", [(32, 32), (640, 427), (1, 5000), (5000, 5000), (7, 3)])
def test_the_vector_loses_nothing(width: int, height: int) -> None:
    for seed in range(500):
        view = draw_view(EVERYTHING, width, height, random.Random(seed))
        vector = view.encode(width, height)
        assert vector.shape == (PARAMS,) and vector.dtype == torch.float32
        assert AugmentationParams.decode(vector, width, height) == view


def test_entries_are_where_their_names_say() -> None:
    view = AugmentationParams(
        *(10, 40, 20, 60, True, True, 1.25, 0.75, 1.5, -0.125),
        order=(3, 1, 0, 2),
        gray=True,
        sigma=1.5,
        solarize=128,
    )
    entries = dict(zip(PARAM_NAMES, view.encode(200, 100).tolist(), strict=True))
    expected = {
        **{"center_y": 0.2, "center_x": 0.35, "height": 0.2, "width": 0.3, "flip": 1, "jitter": 1},
        **{"brightness": 0.25, "contrast": -0.25, "saturation": 0.5, "hue": -0.125},
        **{"hue_position": 0, "contrast_position": 1 / 3},
        **{"brightness_position": 2 / 3, "saturation_position": 1},
        **{"gray": 1, "blur": 1, "sigma": 0.75, "solarize": 0.5},
    }
    assert entries == pytest.approx(expected, rel=1e-6)


def test_no_augmentation_is_neutral() -> None:
    vector = AugmentationParams.identity(640, 480).encode(640, 480)
    neutral = [0.5, 0.5, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1 / 3, 2 / 3, 1, 0, 0, 0, 0]
    assert torch.equal(vector, torch.tensor(neutral))
    assert len(neutral) == 4 + 2 + 2 * len(COLOR_STEPS) + 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "18 finite numbers"),
        ({"center_y": float("nan")}, "18 finite numbers"),
        ({"center_x": 0.9}, "is not a view of an image of 100 x 50"),
        ({"hue_position": 0.0}, "is not a view of an image of 100 x 50"),
    ],
    ids=["short", "nan", "outside", "order"],
)
def test_vectors_of_no_view(change: dict[str, float], message: str) -> None:
    vector = AugmentationParams.identity(100, 50).encode(100, 50).tolist()
    for name, value in change.items():
        vector[PARAM_NAMES.index(name)] = value
    with pytest.raises(ValueError, match=message):
        AugmentationParams.decode(vector if change else vector[:-1], 100, 50)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": (0.0, 1.0)}, "crop scale"),
        ({"scale": (0.9, 0.5)}, "crop scale"),
        ({"ratio": (2.0, 1.0)}, "crop ratio"),
        ({"flip": 1.5}, "flip probability"),
        ({"blur": -0.1}, "blur probability"),
        ({"jitter_strength": (0.1, 0.1, 0.1, 0.6)}, "hue"),
        ({"jitter_strength": (-1, 0.1, 0.1, 0.1)}, "jitter strengths"),
        ({"sigma": (0.0, 1.0)}, "blur sigma"),
        ({"sigma": (1.0, 9.0)}, "blur sigma"),
        ({"blur": 0.5, "size": 6}, "reaches 6 pixels"),
        ({"size": 0}, "at least one pixel"),
    ],
)
def test_impossible_ranges(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**{"size": 16, **options})
