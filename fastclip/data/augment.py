"""Training augmentation: what may be drawn, what was drawn, and the vector a model receives.

Python draws the parameters of a view from a random state; a pipeline makes the pixels from them
(`views.py`, `dali.py`). So the same numbers transform the pixels, can be replayed on the original,
and go to a model that wants to know its augmentation (UniCLIP, Lee et al. 2022, section 3.3).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

COLOR_STEPS = ("brightness", "contrast", "saturation", "hue")
# How colors are turned: about the gray axis, as DALI does, or as torchvision does.
Hue = Literal["yiq", "hsv"]

# What each entry of an encoded vector holds; see `AugmentationParams.encode`.
PARAM_NAMES = (
    *("center_y", "center_x", "height", "width", "flip"),
    *("jitter", "brightness", "contrast", "saturation", "hue"),
    *(f"{step}_position" for step in COLOR_STEPS),
    *("gray", "blur", "sigma", "solarize"),
)
PARAMS = len(PARAM_NAMES)

# Factors are drawn on this grid: float32 then holds them, less one or not, exactly.
_GRID = 4096
# Draws of a step that is refused, before the step is left out.
ATTEMPTS = 32


@dataclass(frozen=True)
class Augmentation:
    """What a view may be: a random resized crop, flip, colors, blur, in this order.

    Args:
        size: side of the square output, in pixels.
        scale: least and greatest share of the image's area that a crop keeps.
        ratio: least and greatest width / height of a crop.
        flip: probability of a horizontal flip.
        jitter: probability of color jitter: all four steps, in random order.
        jitter_strength: of brightness, contrast and saturation, whose factors lie in
            [max(0, 1 - s), 1 + s], and of hue, whose turn lies in [-s, s], s at most half a circle.
        gray: probability that color is taken out.
        blur: probability of a Gaussian blur.
        sigma: its least and greatest standard deviation, in pixels of the output, at most 4.
        solarize: probability that levels from 128 on are inverted.

    Raises:
        ValueError: a range is empty or outside what it can mean.

    Examples:
        >>> from fastclip.data.augment import Augmentation
        >>> strong = Augmentation.strong(224)
        >>> strong.scale, strong.jitter, strong.blur
        ((0.08, 1.0), 0.8, 0.5)
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: float = 0.0
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    gray: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; give at least one pixel")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop scale is {self.scale}; give 0 < min <= max <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop ratio is {self.ratio}; give 0 < min <= max")
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"{name} probability is {value}; give a number in [0, 1]")
        *factors, hue = self.jitter_strength
        if not (all(0 <= factor for factor in factors) and 0 <= hue <= 0.5):
            raise ValueError(
                f"jitter strengths are {self.jitter_strength}; give three numbers of 0 or more for "
                "brightness, contrast and saturation, and one in [0, 0.5] for hue"
            )
        if not 1 / _GRID <= self.sigma[0] <= self.sigma[1] <= 4:
            raise ValueError(f"blur sigma is {self.sigma}; give 1/{_GRID} <= min <= max <= 4")
        if self.blur and blur_radius(self.sigma[1]) >= self.size:
            raise ValueError(
                f"a blur of sigma {self.sigma[1]} reaches {blur_radius(self.sigma[1])} pixels, as "
                f"far as an image of {self.size}; lower sigma"
            )

    @classmethod
    def weak(cls, size: int) -> "Augmentation":
        """The weak view of CLIP-Rocket (Fini et al. 2023): a crop of half the image or more.

        Args:
            size: side of the square output, in pixels.
        """
        return cls(size, scale=(0.5, 1.0))

    @classmethod
    def strong(cls, size: int) -> "Augmentation":
        """The strong view of CLIP-Rocket, as in MoCo v2 (Chen et al. 2020).

        Args:
            size: side of the square output, in pixels.
        """
        return cls(size, scale=(0.08, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5)


@dataclass(frozen=True)
class AugmentationParams:
    """The parameters of one view, as drawn; the defaults leave the image as it is.

    Attributes:
        top, left, height, width: of the crop, in pixels of the original.
        flip: left and right exchanged.
        jitter: whether the color steps are taken.
        brightness, contrast, saturation: factors.
        hue: turn, as a share of the full circle.
        order: the indices of `COLOR_STEPS` in the order in which they are taken.
        gray: color taken out.
        sigma: of the blur, in pixels of the view; 0 for none.
        solarize: the least level that is inverted; 256 for none.

    Examples:
        >>> from fastclip.data.augment import PARAMS, AugmentationParams
        >>> params = AugmentationParams(top=0, left=16, height=64, width=32, flip=True)
        >>> vector = params.encode(width=64, height=64)
        >>> vector.shape == (PARAMS,), AugmentationParams.decode(vector, 64, 64) == params
        (True, True)
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    jitter: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    order: tuple[int, ...] = (0, 1, 2, 3)
    gray: bool = False
    sigma: float = 0.0
    solarize: int = 256

    @classmethod
    def identity(cls, width: int, height: int) -> "AugmentationParams":
        """No augmentation of an image, but for the resize.

        Args:
            width, height: of the image, in pixels.
        """
        return cls(0, 0, height, width)

    def encode(self, width: int, height: int) -> Tensor:
        """The vector of a view: (PARAMS,) float32.

        `PARAM_NAMES` names its entries: the crop's center and size as shares of the image; flip;
        jitter, the factors less 1, hue in turns; each color step's place in the order, from 0 to
        1; gray; blur and half its sigma; and 1 - solarize / 256. So no augmentation is 0.5, 0.5,
        1, 1, then 0 but for the order 0, 1/3, 2/3, 1. Nothing is lost: see `decode`.

        Args:
            width, height: of the original image, in pixels.
        """
        values = [
            *((self.top + self.height / 2) / height, (self.left + self.width / 2) / width),
            *(self.height / height, self.width / width, self.flip),
            *(self.jitter, self.brightness - 1, self.contrast - 1, self.saturation - 1, self.hue),
            *(self.order.index(step) / 3 for step in range(len(COLOR_STEPS))),
            *(self.gray, self.sigma > 0, self.sigma / 2, 1 - self.solarize / 256),
        ]
        return torch.tensor(values, dtype=torch.float32)

    @classmethod
    def decode(
        cls, vector: Tensor | Sequence[float], width: int, height: int
    ) -> "AugmentationParams":
        """The parameters that `encode` put into a vector, for the same size of image.

        Args:
            vector: (PARAMS,), or as many numbers.
            width, height: of the original image, in pixels.

        Raises:
            ValueError: it has not `PARAMS` entries, or they cannot be of such an image.
        """
        values = vector.tolist() if isinstance(vector, Tensor) else list(vector)
        if len(values) != PARAMS or not all(map(math.isfinite, values)):
            raise ValueError(f"{PARAMS} finite numbers describe a view, not {values}")
        y, x, crop_height, crop_width, flip, jitter, *color = values[:10]
        crop_height, crop_width = round(crop_height * height), round(crop_width * width)
        top, left = round(y * height - crop_height / 2), round(x * width - crop_width / 2)
        fits = 0 <= top < top + crop_height <= height and 0 <= left < left + crop_width <= width
        places = [round(3 * place) for place in values[10:14]]
        if not fits or sorted(places) != [0, 1, 2, 3]:
            raise ValueError(f"{values} is not a view of an image of {width} x {height} pixels")
        brightness, contrast, saturation, hue = color
        gray, _, sigma, solarize = values[14:]
        return cls(
            *(top, left, crop_height, crop_width, flip > 0.5, jitter > 0.5),
            *(brightness + 1, contrast + 1, saturation + 1, hue),
            order=tuple(places.index(place) for place in range(len(COLOR_STEPS))),
            gray=gray > 0.5,
            sigma=2 * sigma,
            solarize=round(256 * (1 - solarize)),
        )


def draw_view(
    augmentation: Augmentation,
    width: int,
    height: int,
    rng: random.Random,
    allowed: Callable[[AugmentationParams], bool] | None = None,
) -> AugmentationParams:
    """Draw the parameters of a view.

    The crop is Inception's (Szegedy et al. 2015, section 6): area and aspect ratio drawn until
    the box fits, ten times at most, then the largest central box within the ratio's bounds.

    Args:
        augmentation: what the view may be.
        width, height: of the image, in pixels.
        rng: what is drawn from.
        allowed: whether a view may be used; None for any view. The crop, the flip, the jitter and
            each later step is drawn again until the view so far may be used, and left out after
            32 draws without success. The image as it is must be allowed.

    Returns:
        The parameters, from which `fastclip.data.views.render_view` makes the pixels.

    Examples:
        >>> import random
        >>> from fastclip.data.augment import Augmentation, draw_view
        >>> params = draw_view(Augmentation.strong(224), 640, 480, random.Random(0))
        >>> 0 < params.width <= 640, 0 < params.height <= 480
        (True, True)
        >>> strong = Augmentation.strong(224)
        >>> draw_view(strong, 640, 480, random.Random(0), lambda view: not view.flip).flip
        False
    """
    a = augmentation
    # each gives what differs from the image as it is
    steps: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: _draw_crop(a, width, height, rng),
        lambda: {"flip": True} if rng.random() < a.flip else {},
        lambda: _draw_jitter(a, rng) if rng.random() < a.jitter else {},
        lambda: {"gray": True} if rng.random() < a.gray else {},
        lambda: {"sigma": _on_grid(rng.uniform(*a.sigma))} if rng.random() < a.blur else {},
        lambda: {"solarize": 128} if rng.random() < a.solarize else {},
    )
    view: dict[str, Any] = {"top": 0, "left": 0, "height": height, "width": width}
    for step in steps:
        for _ in range(ATTEMPTS):
            drawn = step()
            if not drawn or allowed is None or allowed(AugmentationParams(**view | drawn)):
                view |= drawn
                break
    return AugmentationParams(**view)


def _draw_crop(
    augmentation: Augmentation, width: int, height: int, rng: random.Random
) -> dict[str, int]:
    least, greatest = augmentation.ratio
    for _ in range(10):
        area = width * height * rng.uniform(*augmentation.scale)
        ratio = math.exp(rng.uniform(math.log(least), math.log(greatest)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            break
    else:
        crop_width = max(1, min(width, round(height * greatest)))
        crop_height = max(1, min(height, round(width / least)))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return {"top": top, "left": left, "height": crop_height, "width": crop_width}


def _draw_jitter(augmentation: Augmentation, rng: random.Random) -> dict[str, Any]:
    *strengths, hue = augmentation.jitter_strength
    factors = [_on_grid(rng.uniform(max(0.0, 1 - s), 1 + s)) for s in strengths]
    factors.append(_on_grid(rng.uniform(-hue, hue)))
    order = list(range(len(COLOR_STEPS)))
    rng.shuffle(order)
    return {"jitter": True, "order": tuple(order), **dict(zip(COLOR_STEPS, factors, strict=True))}


def blur_radius(sigma: float) -> int:
    """How many pixels a blur reaches to each side."""
    return math.ceil(3 * sigma)


def _on_grid(value: float) -> float:
    return round(value * _GRID) / _GRID
