"""What happens to a batch: towers, loss, gradients, update, in the chosen precision."""

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastclip.device import AUTOCAST_DTYPES, autocast
from fastclip.losses.clip import ClipLoss
from fastclip.models.clip import Model
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.health import NOTHING, NonFiniteError, first_non_finite
from fastclip.train.optim import build_optimizer, clamp_logit_scale

# Outputs of a model that belong to no sample.
SHARED = ("logit_scale", "logit_bias")


class Engine:
    """What both engines have in common: inputs, precision, the loss, and what to do about NaN.

    Args:
        model: on the world's device; its parameters stay float32.
        config: the run's configuration.
        world: this process among the others.

    Attributes:
        norm: the gradient's norm of the last `backward`, 0-d.
        skipped: updates left out because float16 overflowed, which the loss scale then avoids.
    """

    def __init__(self, model: Model, config: TrainConfig, world: World) -> None:
        self.model, self.config, self.world = model.model, config, world
        self.norm = torch.zeros(())
        self.skipped = 0
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self._loss = ClipLoss(
            gather_with_grad=True,
            rank=world.rank,
            world_size=world.size,
            label_smoothing=config.label_smoothing,
            backend=config.loss_backend,
        )
        self._autocast = autocast(world.device, config.precision)
        self._mean, self._std = (
            torch.tensor(model.preprocess_config[name], device=world.device).view(3, 1, 1) * 255
            for name in ("mean", "std")
        )

    def backward(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """Compute the loss, 0-d, and the gradient of all micro-batches together.

        Args:
            batches: image (B, 3, S, S) uint8, text (B, L) int64, key: B strings, each.

        Raises:
            NonFiniteError: the loss is not finite, or, but for float16's overflows, the gradient.
        """
        raise NotImplementedError

    def update(self, rate: float) -> None:
        """Apply the gradients at this learning rate; nothing, if float16 overflowed."""
        raise NotImplementedError

    @property
    def logit_scale(self) -> float:
        """The exponentiated logit scale."""
        return self.model.get_parameter("logit_scale").exp().item()

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Normalised float images with channels innermost, and tokens, on the device."""
        device = self.world.device
        images = batch["image"].to(device, non_blocking=True, memory_format=torch.channels_last)
        texts = batch["text"].to(device, non_blocking=True)
        return (images.float() - self._mean) / self._std, texts

    def _whole_loss(self, output: dict[str, Tensor]) -> Tensor:
        """The loss of a whole batch's outputs."""
        # a bias cancels, but data-parallel training wants a gradient of every parameter
        features = output["image_features"], output["text_features"]
        return self._loss(*features, output["logit_scale"], output.get("logit_bias"))

    def _refuse(self, loss: Tensor, batches: Sequence[dict[str, Any]]) -> NoReturn:
        """Raise for a loss or gradient that is not finite, and name where it began."""
        for batch in batches:
            images, texts = self._inputs(batch)
            inputs = {"image": images, "text": texts}
            forward = functools.partial(self.model, images, texts)
            with self._autocast:
                culprit = first_non_finite(self.model, inputs, forward)
            if culprit != NOTHING:
                break
        raise NonFiniteError(
            f"loss {loss.item()}, gradient norm {self.norm.item()}; first non-finite tensor "
            f"on rank {self.world.rank}: {culprit}. No parameter was changed. Samples: "
            f"{', '.join(batch['key'][:4])}, ..."
        )


class TorchEngine(Engine):
    """A model trained by one process or by data-parallel ones; see `Engine`."""

    def __init__(self, model: Model, config: TrainConfig, world: World) -> None:
        super().__init__(model, config, world)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config)
        towers = world.wrap(self.model)
        self._towers = torch.compile(towers) if config.torchcompile else towers
        scaled = AUTOCAST_DTYPES[config.precision] == torch.float16
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)

    def backward(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """See `Engine.backward`; the gradients, unscaled, are in the parameters."""
        (batch,) = batches
        with self._autocast:
            loss = self._whole_loss(self._towers(*self._inputs(batch)))
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        overflow = not torch.isfinite(self.norm)
        if not torch.isfinite(loss) or (overflow and not self._scaler.is_enabled()):
            self._refuse(loss, batches)
        self.skipped += int(overflow)
        return loss.detach()

    def update(self, rate: float) -> None:
        """See `Engine.update`."""
        if self.config.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip_norm, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        clamp_logit_scale(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser and loss scale, under open_clip's names."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: the state is of another model.
        """
        try:
            self.model.load_state_dict(state["state_dict"])
        except RuntimeError as error:
            name = self.config.model
            raise ValueError(f"the checkpoint is not of model {name}: {error}") from error
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        # moments from the checkpoint, decay rates and the like from the configuration
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
