"""The steps of a view against independent code, and replay of what was delivered."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as tv

from fastclip.data import views
from fastclip.data.augment import Augmentation, AugmentationParams, draw_view
from fastclip.data.views import as_tensor, render_view, replay


def noise(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    stream = np.random.default_rng(seed)
    return Image.fromarray(stream.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photograph(folder: Path, number: int = 0) -> Image.Image:
    paths = sorted((folder / "coco_mini" / "val2017").glob("*.jpg"))
    return Image.open(paths[number]).convert("RGB")


def planar(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy()


def levels_apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.4])
def test_factors_are_pillows(factor: float) -> None:
    """To a level: Pillow cuts where we round, and takes a rounded gray for the contrast's."""
    image = noise()
    for step, enhance in (
        (views.brighten, ImageEnhance.Brightness),
        (views.contrast, ImageEnhance.Contrast),
        (views.saturate, ImageEnhance.Color),
    ):
        expected = planar(enhance(image).enhance(factor))
        assert levels_apart(step(planar(image), factor), expected) <= 1, step.__name__


def test_hue_is_a_turn_about_the_gray_axis() -> None:
    image = planar(noise())
    luma = np.tensordot([0.299, 0.587, 0.114], image, axes=1)
    for turn in (-0.1, -0.03, 0.05, 0.1):
        turned = views.turn_hue(image, turn)
        inside = ((turned > 0) & (turned < 255)).all(axis=0)
        after = np.tensordot([0.299, 0.587, 0.114], turned, axes=1)
        # three roundings of half a level
        assert np.abs(after - luma)[inside].max() <= 0.51
    assert np.array_equal(views.turn_hue(image, 0.0), image)
    # there and back is where it began, wherever nothing was cut off
    gentle = 128 + (image - 128) / 4
    assert levels_apart(views.turn_hue(views.turn_hue(gentle, 0.1), -0.1), gentle) <= 2
    red = np.array([200.0, 50.0, 50.0], dtype=np.float32).reshape(3, 1, 1)
    _, green, blue = views.turn_hue(red, 0.05).ravel()
    # as torchvision turns it: from red to yellow
    assert green > blue


def test_torchvisions_hue_is_an_option() -> None:
    image = as_tensor(noise(32, 32))
    params = AugmentationParams(0, 0, 32, 32, jitter=True, hue=0.07)
    expected = tv.adjust_hue(image, 0.07)
    assert torch.equal(render_view(image, params, 32, "hsv"), expected)
    assert not torch.equal(render_view(image, params, 32), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    image = noise()
    side = 2 * math.ceil(3 * sigma) + 1
    expected = tv.gaussian_blur(as_tensor(image), [side, side], [sigma, sigma]).numpy()
    # the rounding of a value that lies on the half may go either way
    assert levels_apart(views.blur(planar(image), sigma), expected) <= 1


def test_gray_and_solarize_are_pillows() -> None:
    image = noise(32, 32)
    whole = AugmentationParams.identity(32, 32)
    solarized = render_view(as_tensor(image), AugmentationParams(0, 0, 32, 32, solarize=128), 32)
    expected = as_tensor(ImageOps.solarize(image, 128))
    # a resize to the same size changes nothing
    assert torch.equal(render_view(as_tensor(image), whole, 32), as_tensor(image))
    assert torch.equal(solarized, expected)
    gray = render_view(as_tensor(image), AugmentationParams(0, 0, 32, 32, gray=True), 32)
    assert levels_apart(gray.numpy(), as_tensor(image.convert("L").convert("RGB")).numpy()) <= 1


def test_steps_are_taken_in_the_order_drawn() -> None:
    image = as_tensor(noise(32, 32))
    factors = {"brightness": 1.4, "contrast": 1.4, "saturation": 0.6, "hue": 0.1}
    params = AugmentationParams(0, 0, 32, 32, jitter=True, order=(2, 0, 3, 1), **factors)
    pixels = image.numpy().astype(np.float32)
    for step, factor in (
        (views.saturate, 0.6),
        (views.brighten, 1.4),
        (views.turn_hue, 0.1),
        (views.contrast, 1.4),
    ):
        pixels = step(pixels, factor)
    assert np.array_equal(render_view(image, params, 32).numpy(), pixels)
    other = AugmentationParams(0, 0, 32, 32, jitter=True, order=(0, 1, 2, 3), **factors)
    assert not torch.equal(render_view(image, params, 32), render_view(image, other, 32))


def test_the_bits_do_not_depend_on_threads() -> None:
    image = as_tensor(noise(640, 480))
    strong = Augmentation(224, scale=(0.3, 1.0), jitter=1.0, blur=1.0)
    params = draw_view(strong, 640, 480, random.Random(0))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(render_view(image, params, 224))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_views_are_dense_and_of_8_bits() -> None:
    image = as_tensor(noise())
    for params in (
        AugmentationParams(5, 10, 20, 30),
        AugmentationParams(5, 10, 20, 30, flip=True),
        AugmentationParams(5, 10, 20, 30, flip=True, gray=True),
    ):
        view = render_view(image, params, 16)
        assert view.shape == (3, 16, 16) and view.dtype == torch.uint8 and view.is_contiguous()


def test_a_flip_exchanges_left_and_right() -> None:
    image = as_tensor(noise())
    plain = render_view(image, AugmentationParams(5, 10, 20, 30), 16)
    flipped = render_view(image, AugmentationParams(5, 10, 20, 30, flip=True), 16)
    assert torch.equal(flipped, plain.flip(2))


def test_resize_is_near_pillows_bicubic(real_data: Path) -> None:
    """Mean within 0.5 levels on photographs, crops of all sizes; Pillow is not to the bit torch."""
    for number in range(40):
        image = photograph(real_data, number)
        params = draw_view(Augmentation(224, scale=(0.08, 1.0)), *image.size, random.Random(number))
        box = (params.left, params.top, params.left + params.width, params.top + params.height)
        expected = image.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        found = render_view(as_tensor(image), params, 224)
        apart = (found.float() - as_tensor(expected).float()).abs()
        assert apart.mean() <= 0.5, number


def test_replay_takes_images_tensors_and_vectors() -> None:
    image = noise()
    params = draw_view(Augmentation.strong(32), *image.size, random.Random(3))
    expected = render_view(as_tensor(image), params, 32)
    for original in (image, as_tensor(image)):
        for described in (params, params.encode(*image.size)):
            assert torch.equal(replay(original, described, 32), expected)
    with pytest.raises(ValueError, match="not a view of an image of 10 x 10"):
        bad = params.encode(*image.size)
        bad[2] = 1.5
        replay(noise(10, 10), bad, 32)
