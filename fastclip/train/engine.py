"""What happens to a batch: towers, loss, gradients, update, in the chosen precision."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastclip.device import AUTOCAST_DTYPES, autocast
from fastclip.functional import clip_loss, siglip_loss
from fastclip.models import checkpoint
from fastclip.models.clip import Model
from fastclip.train.accumulate import accumulate, refuse_batch_norm
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
        refuse_batch_norm(self.model, config.accum_freq)
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self._loss_options: dict[str, Any] = {"backend": config.loss_backend}
        if world.size > 1:
            way = "ring" if config.loss_dist_impl in ("ring", "bidir", "shift") else "gather"
            self._loss_options["dist"] = way
        self._autocast: AbstractContextManager[Any] = autocast(world.device, config.precision)
        self._mean, self._std = (
            torch.tensor(model.preprocess_config[name], device=world.device).view(3, 1, 1) * 255
            for name in ("mean", "std")
        )

    def backward(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """Compute the loss, 0-d, and the gradient of all micro-batches together.

        Args:
            batches: of the loader; the first of images (B, 3, S, S) uint8 and of texts (B, L) int64
                is taken, and key: B strings.

        Raises:
            NonFiniteError: the loss is not finite, or, but for float16's overflows, the gradient.
        """
        raise NotImplementedError

    def update(self, rate: float) -> None:
        """Apply the gradients at this learning rate; nothing, if float16 overflowed."""
        raise NotImplementedError

    @property
    def logit_scale(self) -> float:
        """The exponentiated logit scale; asked for on all ranks."""
        return self.model.get_parameter("logit_scale").exp().item()

    def weights(self) -> dict[str, Tensor] | None:
        """The full float32 weights on the first rank, where the model itself does not hold them.

        All ranks must call this.
        """
        return None

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; called on all ranks.

        Args:
            path: without suffix; the engine knows whether it is a file or a folder.
            training: what belongs to the run besides the engine, see `state.training_state`.

        Raises:
            OSError: on all ranks alike; nothing that was there is lost.
        """
        raise NotImplementedError

    def load(self, content: dict[str, Any]) -> None:
        """Take over the checkpoint that `checkpoint.read` gave.

        Raises:
            ValueError: it is of another model or engine.
        """
        raise NotImplementedError

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Normalised float images with channels innermost, and tokens, on the device."""
        device = self.world.device
        first, *_ = batch["images"]
        images = first.to(device, non_blocking=True, memory_format=torch.channels_last)
        texts = batch["texts"][0].to(device, non_blocking=True)
        return (images.float() - self._mean) / self._std, texts

    def _whole_loss(self, output: dict[str, Tensor]) -> Tensor:
        """The loss of a whole batch's outputs."""
        # with a softmax a bias cancels, but data-parallel training wants a gradient of everything
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        inputs = [output.get(name) for name in names]
        with self._autocast:
            if self.config.siglip:
                return siglip_loss(*inputs, **self._loss_options)  # type: ignore[arg-type]
            smoothing = self.config.label_smoothing
            return clip_loss(*inputs, label_smoothing=smoothing, **self._loss_options)  # type: ignore[arg-type]

    def _refuse(self, loss: Tensor, batches: Sequence[dict[str, Any]]) -> NoReturn:
        """Raise for a loss or gradient that is not finite, and name where it began.

        All ranks search together: the fault may be on one alone.
        """
        for batch in batches:
            images, texts = self._inputs(batch)
            forward = functools.partial(self.model, images, texts)
            with self._autocast:
                found = first_non_finite(self.model, {"image": images, "text": texts}, forward)
            culprits = self.world.gather(found)
            if set(culprits) != {NOTHING}:
                break
        else:
            culprits = self.world.gather(self._non_finite_gradient())
        rank = next((r for r, culprit in enumerate(culprits) if culprit != NOTHING), 0)
        raise NonFiniteError(
            f"loss {loss.item()}, gradient norm {self.norm.item()}; first non-finite tensor "
            f"on rank {rank}: {culprits[rank]}. No parameter was changed. Samples on rank "
            f"{self.world.rank}: {', '.join(batch['key'][:4])}, ..."
        )

    def _non_finite_gradient(self) -> str:
        """The first parameter whose gradient is not finite, where `first_non_finite` sees none."""
        return NOTHING


class TorchEngine(Engine):
    """A model trained by one process or by data-parallel ones; see `Engine`."""

    def __init__(self, model: Model, config: TrainConfig, world: World) -> None:
        super().__init__(model, config, world)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config)
        self._parallel: Any = world.wrap(self.model)
        self._towers = torch.compile(self._parallel) if config.torchcompile else self._parallel
        scaled = AUTOCAST_DTYPES[config.precision] == torch.float16
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)

    def backward(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """See `Engine.backward`; the gradients, unscaled, are in the parameters."""
        # data-parallel gradients stay in the buckets that they are reduced in
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)
        loss = accumulate(
            self._forward,
            batches,
            self._whole_loss,
            shared=SHARED,
            scale_loss=self._scaler.scale,
            context=self._reduce_once,
        )
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        overflow = not torch.isfinite(self.norm)
        if not torch.isfinite(loss) or (overflow and not self._scaler.is_enabled()):
            self._refuse(loss, batches)
        self.skipped += int(overflow)
        return loss

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with self._autocast:
            return self._towers(*self._inputs(batch))

    def _reduce_once(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the ranks with the last micro-batch's backward."""
        if last or self.world.size == 1:
            return nullcontext()
        return self._parallel.no_sync()

    def update(self, rate: float) -> None:
        """See `Engine.update`."""
        if self.config.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip_norm, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        clamp_logit_scale(self.model)

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """See `Engine.save`: one file, under open_clip's names, written by the first rank."""
        problem = None
        if self.world.is_first:
            content = {
                **training,
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
            }
            try:
                checkpoint.write(path.with_suffix(".pt"), content)
            except OSError as error:
                problem = str(error)
        problem = self.world.gather(problem)[0]
        if problem is not None:
            raise OSError(problem)

    def load(self, content: dict[str, Any]) -> None:
        """See `Engine.load`."""
        if "state_dict" not in content:
            raise ValueError("the checkpoint is DeepSpeed's; go on with --deepspeed")
        try:
            self.model.load_state_dict(content["state_dict"])
        except RuntimeError as error:
            name = self.config.model
            raise ValueError(f"the checkpoint is not of model {name}: {error}") from error
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(content["optimizer"])
        # moments from the checkpoint, decay rates and the like from the configuration
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if content.get("scaler"):
            self._scaler.load_state_dict(content["scaler"])


def build_engine(model: Model, config: TrainConfig, world: World) -> Engine:
    """The engine that the configuration asks for."""
    if config.deepspeed:
        # an installation of its own
        from fastclip.train.zero import DeepSpeedEngine

        return DeepSpeedEngine(model, config, world)
    return TorchEngine(model, config, world)
