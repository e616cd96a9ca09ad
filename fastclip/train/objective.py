"""How the engine runs what is trained: an open_clip model, or a system of ours."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastclip.functional import (
    clip_loss,
    distillation_loss,
    global_contrastive_loss,
    siglip_loss,
)
from fastclip.losses.global_contrastive import GlobalContrastiveLoss
from fastclip.models.system import System
from fastclip.train.config import TrainConfig
from fastclip.train.optim import LOGIT_SCALE_MAX
from fastclip.train.teacher import IMAGE, TEXT

Bounds = Mapping[str, tuple[float, float]]


class Objective(Protocol):
    """What is trained, as an engine runs it. `fastclip.models.system.System` is one itself.

    Attributes:
        shared: names of outputs that belong to no sample.
        bounds: parameters held in bounds after every update, by name. Where parameters are in
            low precision, the loss sees these exactly.
        needs_teacher: whether `loss` takes an averaged copy of what is trained.
        memory: what the loss remembers from step to step, for checkpoints; None for nothing.
    """

    @property
    def shared(self) -> Collection[str]: ...

    @property
    def bounds(self) -> Bounds: ...

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def memory(self) -> nn.Module | None: ...

    def begin_epoch(self, epoch: int) -> None:
        """Called on all ranks before the steps of an epoch, from 0 on, or those that are left."""

    def frozen(self, step: int) -> Collection[str]:
        """Names of parameters that no update may touch in this step of a run, the first being 0."""

    def outputs(self, towers: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A micro-batch's outputs by name, see `fastclip.train.accumulate`.

        Args:
            towers: what is trained, wrapped or compiled.
            batch: see `fastclip.models.system.System.features`.
        """

    def loss(
        self, output: Mapping[str, Tensor], teacher: nn.Module | None = None, **exchange: Any
    ) -> Tensor:
        """The loss, 0-d, of a whole batch's outputs; `exchange` as of `fastclip.functional`."""

    def exact(self, output: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Put the values of the float32 parameters named in `bounds` in place of rounded ones."""

    def logit_scale(self, parameter: Callable[[str], Tensor]) -> float | None:
        """The scale of image-text logits, where there is one, of the parameter by its name."""

    def chance(self, samples: int) -> float | None:
        """The loss of a model that distinguishes nothing, where it is known."""


class ClipObjective:
    """An open_clip model with CLIP's or SigLIP's loss; false captions are further columns.

    It stands beside the model, whose parameters keep open_clip's names.
    """

    shared = ("logit_scale", "logit_bias")
    needs_teacher = False
    memory: nn.Module | None = None

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.siglip, self.label_smoothing = config.loss.siglip, config.model.label_smoothing
        self.hard_negatives = config.model.hard_negatives
        self.group_role = config.loss.group_duplicates
        self.teacher_scale: float | None = None
        self.distill_weight = config.loss.distill_weight
        self.bounds: dict[str, tuple[float, float]] = {"logit_scale": (0.0, LOGIT_SCALE_MAX)}
        if getattr(model, "logit_bias", None) is not None:
            self.bounds["logit_bias"] = (-math.inf, math.inf)

    def begin_epoch(self, epoch: int) -> None:
        """See `Objective.begin_epoch`; no epoch differs from another."""

    def frozen(self, step: int) -> Collection[str]:
        """See `Objective.frozen`."""
        return ()

    def outputs(self, towers: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Objective.outputs`."""
        images, texts = batch["images"][0], batch["texts"][0]
        groups = {"group": batch["group"]} if "group" in batch else {}
        if "negatives" not in batch:
            return {**towers(images, texts), **groups}
        negatives = batch["negatives"]
        output = dict(towers(images, torch.cat([texts, negatives.flatten(0, 1)])))
        features, false = output["text_features"].tensor_split([len(texts)])
        output |= {
            "text_features": features,
            "false_features": false.view(*negatives.shape[:2], -1),
        }
        return output

    def loss(
        self, output: Mapping[str, Tensor], teacher: nn.Module | None = None, **exchange: Any
    ) -> Tensor:
        """See `Objective.loss`."""
        texts = output["text_features"]
        if "false_features" in output:
            texts = torch.cat([texts, output["false_features"].flatten(0, 1)])
        # with a softmax a bias cancels, but data-parallel training wants a gradient of everything
        inputs = (output["image_features"], texts, output["logit_scale"], output.get("logit_bias"))
        if "group" in output:
            ids = output["group"]
            exchange |= {"row_group": ids, "column_group": ids, "group_role": self.group_role}
        if self.siglip:
            return siglip_loss(*inputs, **exchange)
        loss = clip_loss(*inputs, label_smoothing=self.label_smoothing, **exchange)
        if IMAGE in output:
            loss = loss + self.distill_weight * self._distillation(output, exchange)
        return loss

    def _distillation(self, output: Mapping[str, Tensor], exchange: Mapping[str, Any]) -> Tensor:
        """The cross-entropy under the teacher's softmax, of the true pairs."""
        assert self.teacher_scale is not None
        return distillation_loss(
            output["image_features"],
            output["text_features"],
            output["logit_scale"],
            output[IMAGE],
            output[TEXT],
            self.teacher_scale,
            # chunked everywhere: two matrices at a time, no fused kernel
            backend="reference" if exchange.get("backend") == "reference" else "auto",
            dist=exchange.get("dist"),
        )

    def exact(self, output: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """See `Objective.exact`; a ratio of 1 and a difference of 0 carry the gradient."""
        rounded = output["logit_scale"].float()
        output["logit_scale"] = parameters["logit_scale"].exp() * (rounded / rounded.detach())
        if "logit_bias" in output:
            rounded = output["logit_bias"].float()
            output["logit_bias"] = parameters["logit_bias"] + (rounded - rounded.detach())

    def logit_scale(self, parameter: Callable[[str], Tensor]) -> float:
        """See `Objective.logit_scale`."""
        return parameter("logit_scale").exp().item()

    def chance(self, samples: int) -> float | None:
        """See `Objective.chance`."""
        added = self.siglip or self.hard_negatives or self.teacher_scale is not None
        return None if added else math.log(samples)


class GlobalObjective(ClipObjective):
    """An open_clip model with a global contrastive loss, see `GlobalContrastiveLoss`.

    Args:
        model, config: of the run.
        samples: that the data hold.
    """

    memory: GlobalContrastiveLoss

    def __init__(self, model: nn.Module, config: TrainConfig, samples: int) -> None:
        super().__init__(model, config)
        options = config.loss
        epochs = options.global_gamma_epochs or max(1, config.optim.epochs // 2)
        memory = GlobalContrastiveLoss(
            samples,
            options.global_variant,
            gamma=options.global_gamma,
            gamma_epochs=None if options.global_variant == "sogclr" else epochs,
            full_first_epoch=options.global_full_first_epoch,
            rho=options.global_rho,
        )
        self.memory = memory.to(model.get_parameter("logit_scale").device)

    def begin_epoch(self, epoch: int) -> None:
        """See `Objective.begin_epoch`."""
        self.memory.set_epoch(epoch)

    def outputs(self, towers: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Objective.outputs`."""
        return {**super().outputs(towers, batch), "index": batch["index"]}

    def loss(
        self, output: Mapping[str, Tensor], teacher: nn.Module | None = None, **exchange: Any
    ) -> Tensor:
        """See `Objective.loss`; moves the averages of the batch's samples."""
        memory = self.memory
        return global_contrastive_loss(
            output["image_features"],
            output["text_features"],
            output["logit_scale"],
            output["index"],
            memory.log_u,
            memory.current_gamma,
            rho=memory.rho,
            eps=memory.eps,
            **exchange,
        )

    def chance(self, samples: int) -> float | None:
        """See `Objective.chance`; it depends on the variant's constants."""
        return None


def objective_of(model: nn.Module, config: TrainConfig, samples: int | None = None) -> Objective:
    """How this model is trained: a system says it itself.

    Args:
        model, config: of the run.
        samples: that the data hold, for a loss that remembers each; None where none is computed.
    """
    if isinstance(model, System):
        return model
    if config.loss.loss == "global" and samples is not None:
        return GlobalObjective(model, config, samples)
    return ClipObjective(model, config)
