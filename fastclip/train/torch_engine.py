"""Training by torch alone: one process, or data-parallel ones."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.device import AUTOCAST_DTYPES
from fastclip.models import checkpoint
from fastclip.models.clip import Model, load_weights
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.engine import Engine
from fastclip.train.optim import (
    build_optimizer,
    check_groups,
    clamp,
    configured,
    gradient_norm,
)
from fastclip.train.wrapped import accumulate_wrapped


class TorchEngine(Engine):
    """A model trained by one process or by data-parallel ones; see `Engine`."""

    def __init__(self, model: Model, config: TrainConfig, world: World, samples: int = 0) -> None:
        super().__init__(model, config, world, samples)
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config.optim, config.own_rates)
        self._parallel = self._wrap()
        self._towers: Any = self._compiled() if config.model.torchcompile else self._parallel
        scaled = AUTOCAST_DTYPES[config.model.precision] == torch.float16
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self._overflowed = False

    def backward(self, batches: Sequence[dict[str, Any]], frozen: Collection[str] = ()) -> Tensor:
        """See `Engine.backward`; the gradients, unscaled, are in the parameters."""
        self._clear_gradients()
        loss = accumulate_wrapped(
            self._parallel,
            self._forward,
            batches,
            self._whole_loss,
            shared=self.objective.shared,
            constant=self._taught,
            scale_loss=self._scaler.scale,
        )
        self._take_gradients()
        for name in frozen:
            self._updated(name).grad = None
        self._scaler.unscale_(self.optimizer)
        self.norm = self._gradient_norm()
        overflow = not torch.isfinite(self.norm)
        if not torch.isfinite(loss) or (overflow and not self._scaler.is_enabled()):
            self._refuse(loss, batches)
        self._overflowed = bool(overflow)
        self.skipped += int(overflow)
        return loss

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with self._autocast:
            return self.objective.outputs(self._towers, self._inputs(batch))

    def _wrap(self) -> nn.Module:
        """The model with gradients averaged over the processes."""
        return self.world.wrap(self.model)

    def _compiled(self) -> Any:
        """What `_wrap` gave, compiled."""
        return torch.compile(self._parallel)

    def _clear_gradients(self) -> None:
        # data-parallel gradients stay in the buckets that they are reduced in
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)

    def _take_gradients(self) -> None:
        """Bring what the backward left to the parameters that the optimizer has."""

    def _updated(self, name: str) -> Tensor:
        """What the optimizer has of a parameter."""
        return self.model.get_parameter(name)

    def _gradient_norm(self) -> Tensor:
        return gradient_norm([p.grad for p in self.parameters if p.grad is not None])

    def update(self, rate: float) -> None:
        """See `Engine.update`."""
        maximum = self.config.optim.grad_clip_norm
        if maximum is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, maximum, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        clamp(self.model, self.objective.bounds)
        if self.average is not None and not self._overflowed:
            self.average.update(self.model)

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """See `Engine.save`: one file, under open_clip's names, written by the first rank."""
        problem = None
        if self.world.is_first:
            content = {
                **training,
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                **self._state_beside(),
            }
            try:
                checkpoint.write(path.with_suffix(".pt"), content)
            except OSError as error:
                problem = str(error)
        problem = self.world.gather(problem)[0]
        if problem is not None:
            raise OSError(problem)

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """See `Engine.load`."""
        if "fsdp" in content:
            raise ValueError(
                "the checkpoint is of a run with --fsdp; resume with it, on any number of processes"
            )
        if "state_dict" not in content:
            raise ValueError("the checkpoint is DeepSpeed's; resume with --deepspeed")
        origin = f"the checkpoint ({self.config.model.model})"
        load_weights(self.model, content["state_dict"], origin)
        self._check_trained(content)
        self._load_beside(content)
        options = [configured(group) for group in self.optimizer.param_groups]
        check_groups(len(content["optimizer"]["param_groups"]), self.optimizer.param_groups)
        self.optimizer.load_state_dict(content["optimizer"])
        # moments from the checkpoint, decay rates and the like from the configuration
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if content.get("scaler"):
            self._scaler.load_state_dict(content["scaler"])
