"""What is trained: towers from elsewhere, and a criterion that is what a paper adds.

A system has two halves. Its `features` give one row a sample, so a batch may go through them in
micro-batches, activations of one alive at a time. Its criterion (heads with batch statistics,
scales, the loss with its negatives) needs all rows at once, and gets features that may be cut off
from their graph (`fastclip.train.accumulate`).

The criterion's parameters still get their gradient through whatever wraps the system, data-parallel
averaging or ZeRO: `forward` hands them out beside the features, and `loss` computes with those.
"""

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

# before the names of the criterion's parameters in the system's state
PREFIX = "criterion."
_TEACHER = "teacher."

Modality = Literal["image", "text"]


class View(NamedTuple):
    """One view of the samples' images or texts; number 0 is the weak one where there are others."""

    modality: Modality
    number: int


@dataclass(frozen=True)
class Features:
    """What the towers make of a batch, one row a sample, and what the criterion needs beside.

    Attributes:
        images, texts: of each view, (N, width).
        params: (N, V, PARAMS), how each view of an image was augmented, where asked for.
        label: (N,) int64, where asked for.
    """

    images: Sequence[Tensor] = ()
    texts: Sequence[Tensor] = ()
    params: Tensor | None = None
    label: Tensor | None = None

    def views(self) -> dict[View, Tensor]:
        """The rows of every view of images, then of texts."""
        images = {View("image", number): rows for number, rows in enumerate(self.images)}
        return images | {View("text", number): rows for number, rows in enumerate(self.texts)}

    def flat(self) -> dict[str, Tensor]:
        """One dictionary, without what is None; see `Outputs`."""
        named = {_name(view): rows for view, rows in self.views().items()}
        beside = {"params": self.params, "label": self.label}
        return named | {name: rows for name, rows in beside.items() if rows is not None}

    @classmethod
    def of(cls, flat: Mapping[str, Tensor]) -> "Features":
        """What `flat` was made of."""

        def views(modality: Modality) -> tuple[Tensor, ...]:
            names = (_name(View(modality, number)) for number in itertools.count())
            return tuple(flat[name] for name in itertools.takewhile(flat.__contains__, names))

        return cls(views("image"), views("text"), flat.get("params"), flat.get("label"))


def _name(view: View) -> str:
    return f"{view.modality}.{view.number}"


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

    features: Features
    parameters: Mapping[str, Tensor]
    taught: Features

    def flat(self) -> dict[str, Tensor]:
        """One dictionary; parameters have their names in the system's state."""
        return {
            **self.features.flat(),
            **{PREFIX + name: value for name, value in self.parameters.items()},
            **{_TEACHER + name: value for name, value in self.taught.flat().items()},
        }

    @classmethod
    def of(cls, flat: Mapping[str, Tensor]) -> "Outputs":
        """What `flat` was made of."""
        made: dict[str, dict[str, Tensor]] = {PREFIX: {}, _TEACHER: {}, "": {}}
        for name, value in flat.items():
            prefix = next(prefix for prefix in made if name.startswith(prefix))
            made[prefix][name.removeprefix(prefix)] = value
        features, taught = Features.of(made[""]), Features.of(made[_TEACHER])
        return cls(features=features, parameters=made[PREFIX], taught=taught)


class Criterion(nn.Module):
    """Heads, scales and loss of a system.

    Attributes:
        bounds: least and greatest value of parameters that are held in bounds after every update,
            by name. They are what low-precision training keeps exact: scales, temperatures.
    """

    bounds: Mapping[str, tuple[float, float]] = {}

    def forward(
        self,
        features: Features,
        *,
        targets: Mapping[View, Tensor] | None = None,
        **exchange: Any,
    ) -> Tensor:
        """The loss of a whole batch, 0-d.

        Args:
            features: what `System.features` gave, of all micro-batches.
            targets: what `targets` of the teacher's criterion gave, where there is a teacher.
            exchange: `dist`, `backend` of `fastclip.functional`. With `dist` the rows of all ranks
                are one batch, and every rank returns its loss. A rank's gradient is W times its
                part, so that their average is the batch's.
        """
        raise NotImplementedError

    def targets(self, features: Features) -> dict[View, Tensor]:
        """What a teacher's criterion makes of the teacher's features; asked without gradient."""
        raise NotImplementedError


class System(nn.Module):
    """Base of all systems; a subclass makes `criterion`, and gives `features` and the encoders.

    It is a `fastclip.train.objective.Objective`, which has the description of what trains it.

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
    # a criterion's buffers are part of the system's state
    memory: nn.Module | None = None

    def __init__(self, criterion: Criterion, image_views: int, text_views: int) -> None:
        super().__init__()
        self.criterion = criterion
        self.image_views, self.text_views = image_views, text_views
        # computes with what `forward` handed out; in a list, so that it is no part of the state
        self._shell = [copy.deepcopy(criterion).to("meta")]

    def features(self, batch: Mapping[str, Any]) -> Features:
        """What the criterion takes.

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
        return Outputs(self.features(batch), handed, Features()).flat()

    def begin_epoch(self, epoch: int) -> None:
        """Called before the steps of an epoch; no epoch differs from another."""

    def frozen(self, step: int) -> Collection[str]:
        """Names of parameters that no update may touch in this step of a run, the first being 0."""
        return ()

    def outputs(self, towers: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What `forward` gives, of `towers`, which wrap the system."""
        return dict(towers(batch))

    def loss(
        self, output: Mapping[str, Tensor], teacher: nn.Module | None = None, **exchange: Any
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
            assert isinstance(teacher, System)
            with torch.no_grad():
                exchange["targets"] = teacher.criterion.targets(outputs.taught)
        return functional_call(shell, state, (outputs.features,), exchange, strict=True)

    def exact(self, output: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Put the values of float32 parameters in place of rounded ones, whose gradient stays."""
        for name, value in parameters.items():
            rounded = output[name].float()
            # a difference of zero, formed first: added one after the other they would round
            output[name] = value + (rounded - rounded.detach())

    @property
    def shared(self) -> set[str]:
        """Names of the outputs that belong to no sample: the criterion's parameters."""
        return {PREFIX + name for name, _ in self.criterion.named_parameters()}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The criterion's, under the system's names."""
        return {PREFIX + name: bound for name, bound in self.criterion.bounds.items()}

    def logit_scale(self, parameter: Callable[[str], Tensor]) -> float | None:
        """The scale of image-text logits for the log, of parameters by name; None without one."""
        return None

    def image_text_bias(self, parameter: Callable[[str], Tensor]) -> float | None:
        """The bias of image-text logits, beside `logit_scale`; None without one."""
        return None

    def chance(self, samples: int) -> float | None:
        """The loss of a system that distinguishes nothing, where it is known."""
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

    def features(self, batch: Mapping[str, Any]) -> Features:
        """The towers' features of every view, each (N, width)."""
        images = [self.towers.encode_image(view) for view in batch["images"]]
        return Features(images, [self.towers.encode_text(view) for view in batch["texts"]])

    @property
    def visual(self) -> nn.Module:
        """The vision tower, where open_clip's functions look for what images it wants."""
        return self.towers.visual

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the towers' activations in the backward pass instead of keeping them."""
        self.towers.set_grad_checkpointing(enable)
