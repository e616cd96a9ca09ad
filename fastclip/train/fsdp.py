"""Training with torch's FSDP2: every process holds its rows of parameters, gradients and moments.

What differs from `TorchEngine`: the model is cut before anything is made of it (`shard.py`), and
what the optimizer, the norm, the clipping, the loss scale and the average see are this process's
rows, as plain tensors. With --precision amp or amp_bf16 blocks are gathered in that type; the loss
and what belongs to no block keep float32 parameters under autocast, as they do without --fsdp.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fastclip.device import AUTOCAST_DTYPES
from fastclip.models import distributed_checkpoint
from fastclip.models.clip import Model
from fastclip.models.distributed_checkpoint import AVERAGE, MODEL, OPTIMIZER
from fastclip.train import sharded_checkpoint
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.health import NOTHING
from fastclip.train.optim import check_groups, gradient_norm
from fastclip.train.shard import as_sharded, own_rows, shard, whole
from fastclip.train.torch_engine import TorchEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


class _SharedGradScaler(torch.amp.GradScaler):
    """What overflowed on one process overflowed on all.

    torch's `ShardedGradScaler` does the same in a shape that its fused AdamW does not take.
    """

    def _unscale_grads_(self, *arguments: Any) -> dict[torch.device, Tensor]:
        overflowed = super()._unscale_grads_(*arguments)
        for flag in overflowed.values():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return overflowed


class FSDPEngine(TorchEngine):
    """A model whose parameters are sharded over the processes; see `Engine`.

    Args:
        model, config, world, samples: see `Engine`; the model is sharded in place.

    Raises:
        ValueError: the objective needs a teacher, which is a whole model.
    """

    def __init__(self, model: Model, config: TrainConfig, world: World, samples: int = 0) -> None:
        world.join_alone()
        self._mesh = init_device_mesh(world.device.type, (world.size,))
        dtype = AUTOCAST_DTYPES[config.model.precision]
        shard(model.model, self._mesh, dtype, compiled=config.model.torchcompile)
        # kept, because a forward without a backward leaves whole ones in the model
        self._named = dict(model.model.named_parameters())
        self._rows = own_rows(self._named)
        self._average: dict[str, Tensor] = {}
        super().__init__(model, config, world, samples)
        rows = {parameter: self._rows[name] for name, parameter in self._named.items()}
        self.parameters = [rows[p] for p in self._named.values() if p.requires_grad]
        for group in self.optimizer.param_groups:
            group["params"] = [rows[parameter] for parameter in group["params"]]
        self._scaler = _SharedGradScaler(world.device.type, enabled=self._scaler.is_enabled())

    def _begin_average(self, decay: float) -> None:
        if self.objective.needs_teacher:
            raise ValueError(
                f"{self.config.model.objective}'s teacher is a whole model, which --fsdp has not; "
                "leave the flag out, or use --deepspeed"
            )
        self._decay = decay
        self._average = {name: rows.detach().clone() for name, rows in self._rows.items()}

    def _wrap(self) -> nn.Module:
        return self.model

    def _compiled(self) -> nn.Module:
        # block by block, before they were sharded
        return self.model

    def _clear_gradients(self) -> None:
        for parameter in (*self._named.values(), *self._rows.values()):
            parameter.grad = None

    def _take_gradients(self) -> None:
        """Give each process's rows their gradient, and average those of unsharded parameters."""
        unsharded = []
        for name, parameter in self._named.items():
            if isinstance(parameter, DTensor):
                gradient: Any = parameter.grad
                self._rows[name].grad = None if gradient is None else gradient.to_local()
            elif parameter.grad is not None:
                unsharded.append(parameter.grad)
        if unsharded and self.world.size > 1:
            together = torch.stack(unsharded)
            dist.all_reduce(together)
            torch._foreach_copy_(unsharded, list(together / self.world.size))

    def _updated(self, name: str) -> Tensor:
        return self._rows[name]

    def _gradient_norm(self) -> Tensor:
        """Over all processes' rows; a parameter that all have counts once."""
        sums = []
        for sharded in (True, False):
            gradients = [
                rows.grad
                for name, rows in self._rows.items()
                if rows.grad is not None and isinstance(self._named[name], DTensor) == sharded
            ]
            norm = gradient_norm(gradients) if gradients else torch.zeros(())
            sums.append(norm.to(self.world.device) ** 2)
        dist.all_reduce(sums[0])
        return (sums[0] + sums[1]).sqrt()

    def update(self, rate: float) -> None:
        """See `Engine.update`."""
        super().update(rate)
        if self._average and not self._overflowed:
            followed = [rows.detach() for rows in self._rows.values()]
            torch._foreach_lerp_(list(self._average.values()), followed, 1 - self._decay)

    @property
    def logit_scale(self) -> float | None:
        """See `Engine.logit_scale`."""
        return self.objective.logit_scale(lambda name: whole(self._named[name]))

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`; on other ranks than the first an empty dictionary."""
        return self._whole(self._rows)

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """See `Engine.averaged_weights`; on other ranks than the first an empty dictionary."""
        return self._whole(self._average) if self._average else None

    def _whole(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, tensor in self._like_parameters(rows).items():
            together = whole(tensor)
            if self.world.is_first:
                weights[name] = together.to("cpu", copy=True)
        return weights | self._buffers() if self.world.is_first else {}

    def _like_parameters(self, rows: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Rows of parameters, by their names, as parts of the whole."""
        return {prefix + name: as_sharded(own, self._named[name]) for name, own in rows.items()}

    def _state(self) -> dict[str, Tensor]:
        """All that is sharded; filling it fills the engine."""
        state = self._like_parameters(self._rows, MODEL)
        state |= self._like_parameters(self._average, AVERAGE)
        for moment in MOMENTS:
            moments = {
                name: self.optimizer.state[rows][moment]
                for name, rows in self._rows.items()
                if rows in self.optimizer.state
            }
            state |= self._like_parameters(moments, f"{OPTIMIZER}{moment}.")
        return state

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write a checkpoint folder; all ranks must call this.

        Args:
            path: the folder, without suffix; see `sharded_checkpoint`.
            training: plain state to store beside it; must hold "step".

        Raises:
            OSError: some rank could not write; raised on all, and earlier checkpoints are whole.
        """

        def write_rows(folder: Path) -> list[Path]:
            distributed_checkpoint.save(folder, self._state())
            return distributed_checkpoint.files_of(folder, self.world.rank)

        steps = {
            name: self.optimizer.state[rows]["step"].clone()
            for name, rows in self._rows.items()
            if rows in self.optimizer.state
        }
        own = {
            "ranks": self.world.size,
            "shapes": self._shapes,
            "buffers": self._buffers(),
            "steps": steps,
            "averaged": bool(self._average),
            "groups": len(self.optimizer.param_groups),
            "scaler": self._scaler.state_dict(),
        }
        training = {**training, "fsdp": own, **self._state_beside()}
        sharded_checkpoint.write(path, training, self.world, write_rows)

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """See `Engine.load`; called on all ranks, of any number.

        Raises:
            ValueError: the checkpoint is of another model or engine, or is damaged.
        """
        if "fsdp" not in content:
            raise ValueError(
                "the checkpoint is of a run without --fsdp; resume without it, or begin with the "
                "checkpoint's weights: --pretrained"
            )
        saved = content["fsdp"]
        model = self.config.model.model
        sharded_checkpoint.require_shapes(path, model, saved["shapes"], self._shapes)
        self._check_trained(content)
        check_groups(saved["groups"], self.optimizer.param_groups)
        for name, step in saved["steps"].items():
            rows = self._rows[name]
            state = {moment: torch.zeros_like(rows) for moment in MOMENTS}
            # where torch's fused AdamW has it
            self.optimizer.state[rows] = {"step": step.to(rows.device), **state}
        state = self._state()
        if not saved["averaged"]:
            state = {n: value for n, value in state.items() if not n.startswith(AVERAGE)}
        distributed_checkpoint.load(path, state)
        if not saved["averaged"]:
            for name, rows in self._average.items():
                rows.copy_(self._rows[name].detach())
        for name, buffer in self.model.named_buffers():
            if name in saved["buffers"]:
                buffer.copy_(saved["buffers"][name])
        # empty where the run had another precision
        if saved["scaler"]:
            self._scaler.load_state_dict(saved["scaler"])
        self._load_beside(content)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._named.items()}

    def _buffers(self) -> dict[str, Tensor]:
        # not `state_dict`, which asks for every sharded parameter too
        lasting = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self.model.named_modules()
            for name in module._buffers.keys() - module._non_persistent_buffers_set
        }
        buffers = self.model.named_buffers()
        return {name: own.detach().cpu().clone() for name, own in buffers if name in lasting}

    def _non_finite_gradient(self) -> str:
        """See `Engine._non_finite_gradient`."""
        for name, rows in self._rows.items():
            if rows.grad is not None and not bool(torch.isfinite(rows.grad).all()):
                return f"gradient of {name!r}"
        return NOTHING
