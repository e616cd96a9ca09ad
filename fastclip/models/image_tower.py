"""Image towers without texts: the base of systems of one, and loading one of any checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.clip import load_weights
from fastclip.models.system import Criterion, Features, System

# where a state dictionary has the image tower: open_clip's models, systems of two towers
_IMAGE_TOWERS = ("visual.", "towers.visual.")


class ImageSystem(System):
    """A system of the image tower alone, under the names that it has in open_clip's models.

    Args:
        visual: an open_clip image tower, (N, 3, S, S) to (N, D).
        criterion, image_views: see `System`.
    """

    def __init__(self, visual: nn.Module, criterion: Criterion, image_views: int) -> None:
        super().__init__(criterion, image_views, text_views=0)
        self.visual = visual

    def features(self, batch: Mapping[str, Any]) -> Features:
        """The tower's features of every view, each (N, D)."""
        return Features([self.visual(view) for view in batch["images"]])

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """The tower's features: (N, 3, S, S) to (N, D)."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """There is no text tower.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} was trained without language and cannot encode text; evaluate "
            "it by its image features or labels, not zero-shot or by retrieval"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the tower's activations in the backward pass instead of keeping them."""
        self.visual.set_grad_checkpointing(enable)  # type: ignore[operator]


def load_image_tower(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the image tower, and nothing else, of any checkpoint.

    Args:
        model: has a `visual`: an open_clip model, or a system.
        weights: a state dictionary of either, see `fastclip.models.checkpoint.read_weights`.

    Raises:
        ValueError: there is no image tower in it, or one of another architecture.
    """
    visual: Any = model.visual
    found = {
        name.removeprefix(prefix): value
        for prefix in _IMAGE_TOWERS
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    if not found:
        raise ValueError(
            "the checkpoint has no image tower: no name begins with "
            f"{' or '.join(_IMAGE_TOWERS)}; the first is {next(iter(weights), None)}"
        )
    try:
        load_weights(visual, found, "the checkpoint's image tower")
    except ValueError as error:
        raise ValueError(f"{error}; give the --model that it was trained with") from error
