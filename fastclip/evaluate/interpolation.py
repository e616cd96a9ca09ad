"""The weight between the weak and strong heads of CLIP-Rocket, chosen on held-out data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastclip.evaluate.features import ImageFeatures
from fastclip.evaluate.zeroshot import class_embeddings, classification_metrics, labeled
from fastclip.models.clip import Model
from fastclip.models.rocket import Rocket

GRID = tuple(step / 10 for step in range(11))


def has_two_heads(model: Model) -> bool:
    """Whether there is a weight to choose."""
    return isinstance(model.model, Rocket) and model.model.criterion.two_spaces


def accuracy_by_head_weight(
    model: Model,
    images: ImageFeatures,
    classes: list[str],
    templates: list[str],
    weights: Sequence[float] = GRID,
    *,
    precision: str = "fp32",
) -> dict[float, float]:
    """Zero-shot accuracy at every weight w of w * cos_weak + (1 - w) * cos_strong.

    Encodes once. Prompts are averaged and normalized for each head by itself (Fini et al. 2023).

    Args:
        images: embedded by this model, at a weight strictly between 0 and 1.

    Raises:
        ValueError: the model has no two heads, or no image has a label.
    """
    if not has_two_heads(model):
        raise ValueError(
            f"{type(model.model).__name__} has no weak and strong heads; leave the head weight out"
        )
    features, labels = labeled(images)
    prompts = class_embeddings(model, classes, templates, precision=precision)
    parts: Any = model.model
    pairs = zip(parts.weak_and_strong(features), parts.weak_and_strong(prompts), strict=True)
    weak, strong = (image @ text.T for image, text in pairs)
    return {
        w: classification_metrics(w * weak + (1 - w) * strong, labels, classes)["acc1"]
        for w in weights
    }


def choose_head_weight(accuracies: dict[float, float]) -> float:
    """The best weight; of several, the one nearest to the middle."""
    best = max(accuracies.values())
    return min((w for w, a in accuracies.items() if a == best), key=lambda w: (abs(w - 0.5), w))


def weigh_heads(
    model: Model,
    held_out: ImageFeatures,
    images: ImageFeatures,
    classes: list[str],
    templates: list[str],
) -> tuple[ImageFeatures, float]:
    """Choose the weight on held-out images and set it; the other images at it, and the weight.

    Args:
        held_out, images: embedded by this model, at a weight strictly between 0 and 1.
    """
    system: Any = model.model
    weight = choose_head_weight(accuracy_by_head_weight(model, held_out, classes, templates))
    parts = system.weak_and_strong(images.features)
    system.head_weight.fill_(weight)
    return replace(images, features=system.weigh(*parts)), weight
