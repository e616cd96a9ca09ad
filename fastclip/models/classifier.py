"""An image tower trained by labels: a control without language, to compare CLIP with.

Fang et al. 2022, "Data Determines Distributional Robustness in Contrastive Language Image
Pre-training".
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
from fastclip.functional import Exchange
from fastclip.models.image_tower import ImageSystem
from fastclip.models.options import SystemOptions
from fastclip.models.system import Criterion, Features, View
from fastclip.ops.checks import without_autocast
from fastclip.ops.collectives import all_reduce_loss, ranks_of
from fastclip.ops.gemm import accumulator_dtype


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
        with without_autocast(features.device):
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
            dist, group, sizes: see `fastclip.functional`; both exchanges are one sum here.
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
        total, rows = all_reduce_loss(
            torch.stack((loss, (label != NO_LABEL).sum().to(loss))), ranks
        )
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
