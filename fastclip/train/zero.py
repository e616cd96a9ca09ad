"""Training with DeepSpeed: optimizer (ZeRO-1), gradients (2) and parameters (3) over the processes.

What differs from `TorchEngine`: with --precision amp or amp_bf16 the parameters themselves are in
float16 or bfloat16 and DeepSpeed keeps float32 ones beside the optimizer, so autocast is off. The
loss sees the float32 scales and biases all the same. An average of the weights is float32, of the
parameters as the towers have them, in every process.
"""

import contextlib
import functools
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.device import AUTOCAST_DTYPES
from fastclip.models import sharded
from fastclip.models.clip import Model
from fastclip.train import sharded_checkpoint
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.engine import Engine
from fastclip.train.health import NOTHING
from fastclip.train.optim import build_optimizer, check_groups
from fastclip.train.wrapped import accumulate_wrapped
from fastclip.train.zero_config import resolve


class DeepSpeedEngine(Engine):
    """A model trained by DeepSpeed; see `Engine`.

    Args:
        model, config, world, samples: see `Engine`; 0-d parameters of the model become (1,).

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        ValueError: the configuration cannot be used with DeepSpeed.
    """

    def __init__(self, model: Model, config: TrainConfig, world: World, samples: int = 0) -> None:
        if config.model.torchcompile:
            raise ValueError("--torchcompile does not work with --deepspeed; leave one out")
        settings = resolve(
            config.distributed.deepspeed_config,
            config,
            micro_batches=config.optim.accum_freq,
            world_size=world.size,
        )
        deepspeed = _import_deepspeed(world)
        super().__init__(model, config, world, samples)
        world.join_alone()
        self._shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        _make_viewable(self.model)
        self._dtype = AUTOCAST_DTYPES[config.model.precision] or torch.float32
        self._autocast = contextlib.nullcontext()
        optimizer = build_optimizer(self.model, config.optim, config.own_rates)
        self._stage = int(settings["zero_optimization"]["stage"])
        if self._stage == 3 and self.average is not None:
            wanted = f"{config.model.objective}'s teacher" if config.optim.ema is None else "--ema"
            raise ValueError(
                f"{wanted} averages whole parameters, which ZeRO-3 shards: use --deepspeed-config "
                "ds_zero2"
            )
        self._engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._zero = self._engine.optimizer
        # a full disk on one rank must not keep it from the exchanges that follow
        self._failures: list[Exception] = []
        self._written: list[Path] = []
        writer = self._engine.checkpoint_engine
        writer.save = functools.partial(_save_or_note, writer.save, self._failures, self._written)
        # those scripts go beside the checkpoints, unguarded; `fastclip convert` does their work
        self._engine._copy_recovery_script = lambda folder: None
        optimizer.register_step_post_hook(lambda *_: self._clamp())

    def backward(self, batches: Sequence[dict[str, Any]], frozen: Collection[str] = ()) -> Tensor:
        """See `Engine.backward`; there is one reduction of gradients, at the end."""
        # the configuration is refused
        assert not frozen, "DeepSpeed updates all parameters together"
        if self._dtype != torch.float32:
            # asked for once a step: where parameters are sharded it is an exchange
            self._exact = {
                name: self._full(self.model.get_parameter(name)) for name in self.objective.bounds
            }
        loss = accumulate_wrapped(
            self._engine,
            self._forward,
            batches,
            self._whole_loss,
            shared=self.objective.shared,
            constant=self._taught,
        )
        self.norm = self._gradient_norm()
        # the norm is the same on all ranks, so all of them come here or none
        if not torch.isfinite(self.norm):
            finite = all(self.world.gather(bool(torch.isfinite(loss))))
            may_lower = self._dtype == torch.float16 and self._zero.loss_scale > 1
            if not (finite and may_lower):
                self._refuse(loss, batches)
        return loss

    def update(self, rate: float) -> None:
        """See `Engine.update`."""
        for group in self._zero.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self._engine.step()
        self.skipped += int(self._zero.overflow)
        if self.average is not None and not self._zero.overflow:
            self.average.update(self.model)

    @property
    def logit_scale(self) -> float | None:
        """See `Engine.logit_scale`; of the float32 parameter."""
        return self.objective.logit_scale(lambda name: self._full(self.model.get_parameter(name)))

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`; on other ranks than the first an empty dictionary."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            full = self._full(parameter)
            if self.world.is_first:
                weights[name] = full.cpu().view(self._shapes[name])
        return weights | self._buffers() if self.world.is_first else {}

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write a checkpoint folder; all ranks must call this.

        Args:
            path: the folder, without suffix; see `sharded_checkpoint`.
            training: plain state to store beside it; must hold "step".

        Raises:
            OSError: some rank could not write; raised on all, and earlier checkpoints are whole.
        """

        def write_shares(folder: Path) -> list[Path]:
            self._failures.clear()
            self._written.clear()
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
            if self._failures:
                raise self._failures[0]
            return self._written

        own = {
            "stage": self._stage,
            "ranks": self.world.size,
            "shapes": self._shapes,
            "buffers": self._buffers(),
            "groups": len(self._zero.param_groups),
            "frozen": [n for n, p in self.model.named_parameters() if not p.requires_grad],
        }
        training = {**training, "zero": own, **self._state_beside()}
        sharded_checkpoint.write(path, training, self.world, write_shares)

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """See `Engine.load`; called on all ranks.

        Reads DeepSpeed's pickles, which may run code: only for folders that are trusted. Another
        number of processes than before is served by a universal copy, written beside the folder
        and deleted again.

        Args:
            path: the folder. Its pickles are read, so it is never taken from a file's content.
            content: what `sharded.read_training` gave of it.

        Raises:
            ValueError: the checkpoint is of another model, engine or stage.
            OSError: it was to be converted for another number of processes, and could not be.
        """
        if "zero" not in content:
            flag = "with --fsdp" if "fsdp" in content else "without it"
            raise ValueError(
                f"the checkpoint is of a run without --deepspeed; resume {flag}, or begin with the "
                "checkpoint's weights: --pretrained"
            )
        saved = content["zero"]
        model = self.config.model.model
        sharded_checkpoint.require_shapes(path, model, saved["shapes"], self._shapes)
        self._check_trained(content)
        # stages 1 and 2 keep the same things, 3 cuts every parameter
        if (saved["stage"] == 3) != (self._stage == 3):
            raise ValueError(
                f"{path} is of ZeRO stage {saved['stage']} and cannot be resumed in stage "
                f"{self._stage}; keep the stage, or begin with its weights: fastclip convert "
                "to-open-clip, then --pretrained"
            )
        check_groups(saved.get("groups", len(self._zero.param_groups)), self._zero.param_groups)
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._zero.param_groups
        ]
        clipping = self._zero.clip_grad
        with self._suiting(path, saved["ranks"]) as (folder, universal):
            self._engine._config.load_universal_checkpoint = universal
            try:
                self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
            finally:
                self._engine._config.load_universal_checkpoint = False
        # moments from the checkpoint, decay rates and the like from the configuration
        for group, own in zip(self._zero.param_groups, options, strict=True):
            group.update(own)
        self._zero.clip_grad = clipping
        for parameter, state in self._zero.optimizer.state.items():
            # AdamW wants its step count as a tensor beside the moments, one a parameter
            count = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
            state["step"] = count.clone()
        self._load_beside(content)

    @contextlib.contextmanager
    def _suiting(self, path: Path, ranks: int) -> Iterator[tuple[Path, bool]]:
        """The folder to load with this number of ranks, and whether it is universal."""
        if sharded.is_universal(path) or ranks == self.world.size:
            yield path, sharded.is_universal(path)
            return
        temporary = path.with_name(path.name + sharded.TEMPORARY_SUFFIX)
        failure = None
        try:
            if self.world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                try:
                    sharded.to_universal(path, temporary / "copy")
                # whatever it is, the other ranks must hear of it
                except Exception as error:
                    failure = f"{type(error).__name__}: {error}"
            failure = self.world.gather(failure)[0]
            if failure:
                raise OSError(f"{path} cannot be converted for {self.world.size} ranks: {failure}")
            yield temporary / "copy", True
            self.world.barrier()
        finally:
            if self.world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._inputs(batch)
        inputs["images"] = [image.to(self._dtype) for image in inputs["images"]]
        return inputs

    def _forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        output = self.objective.outputs(self._engine, self._inputs(batch))
        if self._dtype != torch.float32:
            self.objective.exact(output, self._exact)
        return output

    def _gradient_norm(self) -> Tensor:
        """Over all ranks' gradients; infinite where one is not finite, in all types."""
        if self._stage == 3:
            from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        else:
            norm = self._zero.scaled_global_norm()
        # DeepSpeed's sign for what is not finite is -1
        norm = torch.as_tensor(norm, dtype=torch.float32)
        return torch.where(norm < 0, math.inf, norm) / self._zero.loss_scale

    @torch.no_grad()
    def _clamp(self) -> None:
        """Keep the float32 scales in their bounds, before DeepSpeed hands them to the towers."""
        for name, (least, greatest) in self.objective.bounds.items():
            parameter: Any = self.model.get_parameter(name)
            if not parameter.requires_grad:
                continue
            if self._stage == 3:
                own = self._zero.get_local_fp32_param(parameter)
            else:
                own = None if parameter._hp_mapping is None else parameter._hp_mapping.hp_fragment
            if own is not None:
                own.clamp_(-_largest(-least, self._dtype), _largest(greatest, self._dtype))

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """The whole float32 parameter, a copy; all ranks must ask for it."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full.detach().float().clone()
        # what is frozen has no float32 twin, and in stage 3 is sharded all the same
        if not hasattr(parameter, "ds_id"):
            return parameter.detach().float().clone()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().float().clone()

    def _buffers(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {
            name: state[name].detach().cpu().clone() for name in state if name not in self._shapes
        }

    def _non_finite_gradient(self) -> str:
        """See `Engine._non_finite_gradient`."""
        from deepspeed.utils import safe_get_full_grad

        found = NOTHING
        for name, parameter in self.model.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None and not torch.isfinite(gradient).all() and found == NOTHING:
                found = f"gradient of {name!r}"
        return found


def _import_deepspeed(world: World) -> Any:
    # read once, at the first import; a machine with GPUs may still train on its CPU
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    used = get_accelerator().device_name()
    if used != world.device.type:
        raise ValueError(
            f"DeepSpeed uses {used} but --device is {world.device.type}; set "
            f"DS_ACCELERATOR={world.device.type}"
        )
    # on a CPU it would compile an exchange through shared memory, for minutes and behind a lock
    # that a killed process leaves; the process group does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _make_viewable(model: nn.Module) -> None:
    """DeepSpeed views parameters as bytes, which neither 0-d nor channels-last tensors allow."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # not contiguous(): a 1x1 convolution in channels_last passes for it, strides and all
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            if parameter.ndim == 0:
                wide = nn.Parameter(parameter.data.view(1), parameter.requires_grad)
                setattr(module, name, wide)


def _save_or_note(
    save: Any, failures: list[Exception], written: list[Path], state_dict: Any, path: str
) -> None:
    try:
        save(state_dict, path)
        written.append(Path(path))
    except (OSError, RuntimeError) as error:
        failures.append(error)


def _largest(limit: float, dtype: torch.dtype) -> float:
    """The largest number of this type that is at most `limit`, as float32 rounds it."""
    bound = torch.tensor(limit)
    rounded = bound.to(dtype)
    if rounded.float() > bound:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return rounded.item()
