"""What happens to a batch: towers, loss, gradients, update, in the chosen precision."""

import functools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastclip.device import autocast
from fastclip.models import checkpoint
from fastclip.models.clip import Model
from fastclip.models.system import Features, Outputs
from fastclip.train.accumulate import refuse_batch_norm
from fastclip.train.average import TEACHER_DECAY, WeightAverage
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.health import NOTHING, NonFiniteError, earliest, first_non_finite
from fastclip.train.objective import ClipObjective, objective_of
from fastclip.train.teacher import build_teacher


class Engine:
    """What all engines have in common: inputs, precision, the loss, and what to do about NaN.

    Args:
        model: on the world's device, in float32.
        config: the run's configuration.
        world: this process among the others.
        samples: that the data hold, for a loss that remembers each.

    Attributes:
        objective: how `model` is run.
        average: of the weights, where the configuration or the objective wants one.
        norm: the gradient's norm of the last `backward`, 0-d.
        skipped: updates left out because float16 overflowed, which the loss scale then avoids.
    """

    def __init__(self, model: Model, config: TrainConfig, world: World, samples: int = 0) -> None:
        self.model, self.config, self.world = model.model, config, world
        self.objective = objective_of(self.model, config, samples)
        self.average: WeightAverage | None = None
        if self.objective.needs_teacher or config.optim.ema is not None:
            self._begin_average(TEACHER_DECAY if config.optim.ema is None else config.optim.ema)
        self._distilled = build_teacher(config, model, world.device, samples)
        if self._distilled is not None:
            assert isinstance(self.objective, ClipObjective)
            self.objective.teacher_scale = self._distilled.logit_scale
        self.norm = torch.zeros(())
        self.skipped = 0
        refuse_batch_norm(self.model, config.optim.accum_freq)
        if config.model.grad_checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self._loss_options: dict[str, Any] = {"backend": config.loss.loss_backend}
        if world.size > 1:
            exchange = (
                "ring" if config.loss.loss_dist_impl in ("ring", "bidir", "shift") else "gather"
            )
            self._loss_options["dist"] = exchange
        self._autocast: AbstractContextManager[Any] = autocast(world.device, config.model.precision)
        self._mean, self._std = (
            torch.tensor(model.preprocess_config[name], device=world.device).view(3, 1, 1) * 255
            for name in ("mean", "std")
        )

    def _begin_average(self, decay: float) -> None:
        self.average = WeightAverage(self.model, decay)

    def backward(self, batches: Sequence[dict[str, Any]], frozen: Collection[str] = ()) -> Tensor:
        """Compute the loss, 0-d, and the gradient of all micro-batches together.

        Args:
            batches: of the loader, see `fastclip.data.loader.TrainingLoader`.
            frozen: names of parameters that get no gradient: the update leaves them and their
                moments as they are.

        Raises:
            NonFiniteError: the loss is not finite, or, but for float16's overflows, the gradient.
        """
        raise NotImplementedError

    def update(self, rate: float) -> None:
        """Apply the gradients at this learning rate; nothing, if float16 overflowed."""
        raise NotImplementedError

    @property
    def logit_scale(self) -> float | None:
        """The scale of image-text logits, where there is one; asked for on all ranks."""
        return self.objective.logit_scale(self.model.get_parameter)

    def weights(self) -> dict[str, Tensor] | None:
        """The full float32 weights on the first rank, where the model itself does not hold them.

        All ranks must call this.
        """
        return None

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """As `weights`, of the average, where `average` does not hold them."""
        return None

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all; called on all ranks.

        Args:
            path: without suffix; the engine knows whether it is a file or a folder.
            training: what belongs to the run besides the engine, see `TrainState.content`.

        Raises:
            OSError: on all ranks alike; nothing that was there is lost.
        """
        raise NotImplementedError

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """Take over a checkpoint.

        Args:
            path: the file or folder that was opened.
            content: what `checkpoint.read` gave of it.

        Raises:
            ValueError: it is of another model or engine.
        """
        raise NotImplementedError

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """On the device: normalized float images with channels innermost, tokens, parameters."""
        device = self.world.device
        moved = [
            view.to(device, non_blocking=True, memory_format=torch.channels_last)
            for view in batch["images"]
        ]
        inputs = {"images": [(view.float() - self._mean) / self._std for view in moved]}
        inputs["texts"] = [text.to(device, non_blocking=True) for text in batch.get("texts", ())]
        for name in ("params", "negatives", "label", "index", "group"):
            if name in batch:
                inputs[name] = batch[name].to(device, non_blocking=True)
        return inputs

    def _taught(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A teacher's features of a micro-batch."""
        if self._distilled is not None:
            # stored features need no images
            seen = Engine._inputs(self, batch) if self._distilled.is_live else batch
            return self._distilled(seen)
        if not self.objective.needs_teacher:
            return {}
        assert self.average is not None
        teacher: Any = self.average.model.train()
        with autocast(self.world.device, self.config.model.precision):
            features = teacher.features(Engine._inputs(self, batch))
        taught = Outputs(Features(), {}, features).flat()
        # what DeepSpeed casts to low precision is no part of the teacher
        return {n: v.to(torch.promote_types(v.dtype, torch.float32)) for n, v in taught.items()}

    def _whole_loss(self, output: dict[str, Tensor]) -> Tensor:
        """The loss of a whole batch's outputs."""
        teacher = self.average.model if self.average else None
        with self._autocast:
            return self.objective.loss(output, teacher, **self._loss_options)

    def _state_beside(self) -> dict[str, Any]:
        """What a checkpoint holds of the average and of what the loss remembers, and which
        parameters are trained."""
        state: dict[str, Any] = {checkpoint.TRAINED: self._trained}
        if self.average is not None:
            state[checkpoint.AVERAGE] = self.average.state_dict()
        if self.objective.memory is not None:
            state[checkpoint.MEMORY] = self.objective.memory.state_dict()
        return state

    @property
    def _trained(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _check_trained(self, content: dict[str, Any]) -> None:
        """Refuse a checkpoint whose run trained other parameters: their moments are not there.

        Raises:
            ValueError: it did.
        """
        own = set(self._trained)
        # those of before do not say it
        different = own ^ set(content.get(checkpoint.TRAINED, own))
        if different:
            raise ValueError(
                f"the checkpoint's run trained other parameters ({min(different)!r}, "
                f"{len(different)} in all); give its --lock-image, --lock-text, --text-lm-unfrozen "
                "and --global-variant, or begin with its weights: --pretrained"
            )

    def _load_beside(self, content: dict[str, Any]) -> None:
        """Take these over; an average that the run did not have begins at its weights, and a memory
        empty."""
        if self.average is not None:
            self.average.load_state_dict(content.get(checkpoint.AVERAGE, self.model.state_dict()))
        if self.objective.memory is not None and checkpoint.MEMORY in content:
            self.objective.memory.load_state_dict(content[checkpoint.MEMORY])

    def _refuse(self, loss: Tensor, batches: Sequence[dict[str, Any]]) -> NoReturn:
        """Raise for a loss or gradient that is not finite, and name where it began.

        All ranks search together: the fault may be on one alone.
        """
        for batch in batches:
            inputs = self._inputs(batch)
            forward = functools.partial(self.objective.outputs, self.model, inputs)
            given = {f"image {view}": image for view, image in enumerate(inputs["images"])}
            if self._distilled is not None:
                given |= self._taught(batch)
            with self._autocast:
                found = first_non_finite(self.model, given, forward)
            culprits = self.world.gather(found)
            if set(culprits) != {NOTHING}:
                break
        else:
            culprits = self.world.gather(self._non_finite_gradient())
        rank = earliest(culprits)
        raise NonFiniteError(
            f"loss {loss.item()}, gradient norm {self.norm.item()}; first non-finite tensor "
            f"on rank {rank}: {culprits[rank]}. No parameter was changed. Samples on rank "
            f"{self.world.rank}: {', '.join(batch['key'][:4])}, ..."
        )

    def _non_finite_gradient(self) -> str:
        """The first parameter whose gradient is not finite, where `first_non_finite` sees none."""
        return NOTHING
