"""What is trained: towers from elsewhere, and a criterion that is what a paper adds.

A system has two halves. Its `features` give one row a sample, so a batch may go through them in
micro-batches, activations of one alive at a time. Its criterion (heads with batch statistics,
scales, the loss with its negatives) needs all rows at once, and gets features that may be cut off
from their graph (`fastclip.train.accumulate`).

The criterion's parameters still get their gradient through whatever wraps the system, data-parallel
averaging or ZeRO: `forward` hands them out beside the features, and `loss` computes with those.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

# before the names of the criterion's parameters in the system's state
PREFIX = "criterion."
_TEACHER = "teacher."


@dataclass(frozen=True)
class Outputs:
    """What the loss of a batch is computed from.

    Whatever wraps a system, and `fastclip.train.accumulate`, wants one flat dictionary of tensors;
    `flat` and `of` alone know its names.

    Attributes:
        features: of the system, see `System.features`.
        parameters: of the criterion, by their names in it; they belong to no sample.
        taught: a teacher's features.
    """

    features: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    taught: Mapping[str, Tensor] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """One dictionary; parameters have their names in the system's state."""
        return {
            **self.features,
            **{PREFIX + name: value for name, value in self.parameters.items()},
            **{_TEACHER + name: value for name, value in self.taught.items()},
        }

    @classmethod
    def of(cls, flat: Mapping[str, Tensor]) -> "Outputs":
        """What `flat` was made of."""
        made: dict[str, dict[str, Tensor]] = {PREFIX: {}, _TEACHER: {}, "": {}}
        for name, value in flat.items():
            prefix = next(prefix for prefix in made if name.startswith(prefix))
            made[prefix][name.removeprefix(prefix)] = value
        return cls(features=made[""], parameters=made[PREFIX], taught=made[_TEACHER])


class Criterion(nn.Module):
    """Heads, scales and loss of a system.

    Attributes:
        bounds: least and greatest value of parameters that are held in bounds after every update,
            by name. They are what low-precision training keeps exact: scales, temperatures.
    """

    bounds: Mapping[str, tuple[float, float]] = {}

    def forward(
        self,
        features: Mapping[str, Tensor],
        *,
        targets: Mapping[str, Tensor] | None = None,
        **exchange: Any,
    ) -> Tensor:
        """The loss of a whole batch, 0-d.

        Args:
            features: what `System.features` gave, of all micro-batches.
            targets: what `targets` of the teacher's criterion gave, where there is a teacher.
            exchange: `dist`, `backend` of `fastclip.functional`. With `dist` the rows of all ranks
                are one batch, every rank returns its loss, and gradients are W times its own.
        """
        raise NotImplementedError

    def targets(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a teacher's criterion makes of the teacher's features; asked without gradient."""
        raise NotImplementedError


class System(nn.Module):
    """Base of all systems; a subclass makes `criterion`, and gives `features` and the encoders.

    Args:
        criterion: its parameters should all have a part in the loss, or be frozen: data-parallel
            training waits for the gradient of every one.
        image_views, text_views: how many of each a batch has.

    Attributes:
        needs_teacher: whether the criterion takes the targets of a teacher, a slowly following
            average of the system.
    """

    criterion: Criterion
    needs_teacher = False

    def __init__(self, criterion: Criterion, image_views: int, text_views: int) -> None:
        super().__init__()
        self.criterion = criterion
        self.image_views, self.text_views = image_views, text_views
        # computes with what `forward` handed out; in a list, so that it is no part of the state
        self._shell = [copy.deepcopy(criterion).to("meta")]

    def features(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the criterion takes, by name: one row a sample, floating-point or integer.

        Args:
            batch: images: views (N, 3, S, S), normalized as the towers want them. texts: views
                (N, L) of tokens. params: (N, V, PARAMS). Where asked for: negatives (N, K, L),
                label (N,) int64.
        """
        raise NotImplementedError

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(N, 3, S, S) to (N, D), as evaluation compares it."""
        raise NotImplementedError

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(N, L) tokens to (N, D), as evaluation compares it."""
        raise NotImplementedError

    def renormalize(self, features: Tensor) -> Tensor:
        """Averages of encoded features, (N, D), made comparable again."""
        return F.normalize(features, dim=-1)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The features and the criterion's parameters, flat, see `Outputs`.

        Raises:
            ValueError: the batch has another number of views.
        """
        counts = len(batch["images"]), len(batch["texts"])
        if counts != (self.image_views, self.text_views):
            raise ValueError(
                f"{type(self).__name__} takes {self.image_views} image and {self.text_views} text "
                f"views of each sample; the batch has {counts[0]} and {counts[1]}"
            )
        # copies: where parameters are sharded, the whole one is gone after the forward; by
        # `get_parameter`, which makes it whole
        handed = {
            name: self.criterion.get_parameter(name).clone()
            for name, _ in self.criterion.named_parameters()
        }
        return Outputs(self.features(batch), handed).flat()

    def loss(
        self, output: Mapping[str, Tensor], teacher: "System | None" = None, **exchange: Any
    ) -> Tensor:
        """The loss of a whole batch, 0-d.

        Args:
            output: what `forward` gave, of all micro-batches; with a teacher's features, see
                `Outputs`.
            teacher: where the system needs one.
            exchange: see `Criterion.forward`.
        """
        outputs = Outputs.of(output)
        state = {**outputs.parameters, **dict(self.criterion.named_buffers())}
        shell = self._shell[0].train(self.criterion.training)
        if self.needs_teacher:
            assert teacher is not None
            with torch.no_grad():
                exchange["targets"] = teacher.criterion.targets(outputs.taught)
        return functional_call(shell, state, (outputs.features,), exchange, strict=True)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The criterion's, under the system's names."""
        return {PREFIX + name: bound for name, bound in self.criterion.bounds.items()}

    @property
    def logit_scale_of(self) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Name of the parameter that holds the image-text scale, and how: for the log; or None."""
        return None


class TwoTowers(System):
    """A system on an open_clip model: a vision and a text tower of one width.

    The towers' own features, before their last normalization, are what heads project. The model's
    own logit scale is out of use.

    Args:
        towers: has `encode_image` and `encode_text`, as open_clip's models have.
        criterion, image_views, text_views: see `System`.
    """

    def __init__(
        self, towers: nn.Module, criterion: Criterion, image_views: int, text_views: int
    ) -> None:
        super().__init__(criterion, image_views, text_views)
        # open_clip's kinds of models share no base class with these methods
        self.towers: Any = towers
        for name in ("logit_scale", "logit_bias"):
            scale = getattr(towers, name, None)
            if scale is not None:
                scale.requires_grad_(False)

    def features(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """image.0, image.1, ... and text.0, ..., each (N, width)."""
        return {**self.image_features(batch["images"]), **self.text_features(batch["texts"])}

    def image_features(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """The vision tower's features of every view, by name."""
        return {f"image.{i}": self.towers.encode_image(v) for i, v in enumerate(views)}

    def text_features(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """The text tower's features of every view, by name."""
        return {f"text.{i}": self.towers.encode_text(v) for i, v in enumerate(views)}

    @property
    def visual(self) -> nn.Module:
        """The vision tower, where open_clip's functions look for what images it wants."""
        return self.towers.visual

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the towers' activations in the backward pass instead of keeping them."""
        self.towers.set_grad_checkpointing(enable)
