"""Models without language: what CLIP is compared with to find what language is good for.

Fang et al. 2022 ("Data Determines Distributional Robustness in Contrastive Language Image
Pre-training") train the same image tower by labels, and by contrasting views of images alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.data.labels import NO_LABEL
from fastclip.functional import Exchange, nt_xent_loss
from fastclip.models.clip import load_weights
from fastclip.models.options import SystemOptions
from fastclip.models.rocket import SIMCLR_TEMPERATURE, TERMS
from fastclip.models.system import Criterion, Features, System, View
from fastclip.nn.heads import MLPHead
from fastclip.ops.collectives import global_sum, ranks_of
from fastclip.ops.gemm import accumulator_dtype

# where a state dictionary has the image tower: open_clip's models, systems of two towers
_IMAGE_TOWERS = ("visual.", "towers.visual.")


class ImageSystem(System):
    """A system of the image tower alone, under the names that it has in open_clip's models.

    Args:
        visual: an image tower of open_clip's, (N, 3, S, S) to (N, D).
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


class LabelCriterion(Criterion):
    """Cross-entropy of a linear classifier over the labeled rows.

    Args:
        width: D, of the features.
        classes: C.
        label_smoothing: mass of the target that is spread over all classes.
        prototype: compare features and weights by their angle: both normalized, no bias, a learned
            scale of at most 100.
        weight: (C, D) to begin with, e.g. class names' text features times a scale; by default
            random.

    Raises:
        ValueError: fewer than 1 class, or a weight of another shape.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        label_smoothing: float = 0.0,
        prototype: bool = False,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"{classes} classes: there is nothing to classify; give --classes")
        if weight is not None and weight.shape != (classes, width):
            raise ValueError(
                f"the weight is {tuple(weight.shape)}; {classes} classes and features of width "
                f"{width} need {(classes, width)}"
            )
        self.label_smoothing = label_smoothing
        # small: the classes begin alike
        drawn = torch.empty(classes, width).normal_(std=0.01) if weight is None else weight
        self.weight = nn.Parameter(drawn.detach().clone())
        self.bias = None if prototype else nn.Parameter(torch.zeros(classes))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log()) if prototype else None
        if prototype:
            self.bounds = {"logit_scale": (0.0, math.log(100))}

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C), float32 (float64 for float64)."""
        with torch.autocast(features.device.type, enabled=False):
            dtype = accumulator_dtype(features.dtype)
            features, weight = features.to(dtype), self.weight.to(dtype)
            if self.bias is not None:
                return F.linear(features, weight, self.bias.to(dtype))
            assert self.logit_scale is not None
            cosines = F.linear(F.normalize(features, dim=1), F.normalize(weight, dim=1))
            return self.logit_scale.to(dtype).exp() * cosines

    def forward(
        self,
        features: Features,
        *,
        targets: Mapping[View, Tensor] | None = None,
        dist: Exchange | None = None,
        group: ProcessGroup | None = None,
        sizes: Sequence[int] | None = None,
        **implementation: Any,
    ) -> Tensor:
        """The mean over all ranks' labeled rows, 0-d; 0 where there is none.

        Args:
            features: one image view, (N, D), and label, (N,) int64, -1 for none.
            dist, group, sizes: see `fastclip.functional`; both ways are one sum here.
        """
        label = features.label
        assert label is not None
        ranks = ranks_of(dist, group, sizes, len(label))
        logits = self.logits(features.images[0])
        loss = F.cross_entropy(
            logits,
            label,
            ignore_index=NO_LABEL,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        total, rows = global_sum(torch.stack((loss, (label != NO_LABEL).sum().to(loss))), ranks)
        return total / rows.clamp(min=1)


class Classifier(ImageSystem):
    """An image tower and a linear classifier over its features, trained by labels.

    Args:
        visual: see `ImageSystem`; frozen, the classifier alone is trained.
        width: D, of its features.
        classes, label_smoothing, prototype, weight: see `LabelCriterion`.
    """

    criterion: LabelCriterion

    def __init__(self, visual: nn.Module, width: int, classes: int, **options: Any) -> None:
        super().__init__(visual, LabelCriterion(width, classes, **options), image_views=1)

    @classmethod
    def of(
        cls,
        model: Any,
        width: int,
        options: SystemOptions,
        classes: int,
        weight: Tensor | None = None,
    ) -> "Classifier":
        """With the image tower of an open_clip model, whose features have `width`."""
        return cls(
            model.visual,
            width,
            classes,
            label_smoothing=options.label_smoothing,
            prototype=options.classifier != "linear",
            weight=weight,
        )

    def features(self, batch: Mapping[str, Any]) -> Features:
        """See `ImageSystem.features`; beside them label, (N,)."""
        return replace(super().features(batch), label=batch["label"])

    def classify(self, image: Tensor) -> Tensor:
        """(N, 3, S, S) to logits, (N, C)."""
        return self.criterion.logits(self.encode_image(image))


class ViewCriterion(Criterion):
    """SimCLR's loss of two views (Chen et al. 2020, eq. 1) behind an MLP.

    Each view is normalized by its own batch statistics, as in SLIP (Mu et al. 2021).

    Args:
        width, hidden, output: of the features, the MLP's two hidden layers, and what it gives.
        temperature: > 0, fixed.
    """

    def __init__(self, width: int, hidden: int, output: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = MLPHead([width, hidden, hidden, output], last_bias=True)

    def forward(
        self,
        features: Features,
        *,
        targets: Mapping[View, Tensor] | None = None,
        **exchange: Any,
    ) -> Tensor:
        """See `Criterion.forward`; of the features two image views, (N, width)."""
        first, second = (F.normalize(self.projector(rows), dim=1) for rows in features.images)
        return nt_xent_loss(first, second, self.temperature, **exchange)


class SimCLR(ImageSystem):
    """An image tower trained to know two views of an image from those of others.

    Args:
        visual: see `ImageSystem`.
        width: of its features.
        hidden, output, temperature: see `ViewCriterion`; by default SLIP's.
    """

    def __init__(
        self,
        visual: nn.Module,
        width: int,
        *,
        hidden: int = TERMS["slip"].widths[0],
        output: int = TERMS["slip"].widths[-1],
        temperature: float = SIMCLR_TEMPERATURE,
    ) -> None:
        super().__init__(visual, ViewCriterion(width, hidden, output, temperature), image_views=2)

    @classmethod
    def of(cls, model: Any, width: int, options: SystemOptions) -> "SimCLR":
        """With the image tower of an open_clip model, whose features have `width`."""
        widths = {"hidden": options.projector_hidden, "output": options.projector_width}
        return cls(model.visual, width, **{k: v for k, v in widths.items() if v is not None})


def load_image_tower(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the image tower, and nothing else, of any checkpoint.

    Args:
        model: has a `visual`: a model of open_clip's, or a system.
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
