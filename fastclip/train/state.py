"""A run between two steps, as one value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.data.loader import TrainingLoader
from fastclip.flags import flatten
from fastclip.models.clip import Model
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.engine import Engine
from fastclip.train.streams import rng_state


@dataclass
class TrainState:
    """Everything that the next step depends on.

    A step changes the three numbers, what `engine` holds (weights, optimizer) and the random
    streams of this process; all else stays as it is during a run.

    Attributes:
        config: with a name.
        world: this process among the others.
        folder: the run directory.
        model: what is trained, with its transform and tokenizer.
        loader: of the training data.
        engine: computes gradients and applies them.
        step: updates made.
        epoch: epochs finished.
        position: samples of the current epoch that were used, over all ranks.
    """

    config: TrainConfig
    world: World
    folder: Path
    model: Model
    loader: TrainingLoader
    engine: Engine
    step: int = 0
    epoch: int = 0
    position: int = 0

    @property
    def step_samples(self) -> int:
        """Samples of a step over all ranks."""
        return self.config.optim.step_samples(self.world.size)

    @property
    def step_in_epoch(self) -> int:
        """Steps of the current epoch that were made."""
        return self.position // self.step_samples

    @property
    def epoch_is_done(self) -> bool:
        """Whether no step of the current epoch is left; `end_of_epoch` begins the next."""
        return self.step_in_epoch >= self.loader.steps_per_epoch

    @property
    def steps_done(self) -> int:
        """Steps of all epochs up to here; as `step`, unless the length of an epoch has changed."""
        return self.epoch * self.loader.steps_per_epoch + self.step_in_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, had all epochs the length that they have now."""
        return self.config.optim.epochs * self.loader.steps_per_epoch

    @property
    def last_step(self) -> int:
        """What `step` is at the run's end; `total_steps`, unless epochs had another length."""
        return self.step + max(0, self.total_steps - self.steps_done)

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.folder / "checkpoints"

    def streams(self) -> list[dict[str, Any]]:
        """The random streams of every rank, see `rng_state`; called on all ranks."""
        return self.world.gather(rng_state(self.world.device))

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds besides the engine's part; called on all ranks.

        The first entries have open_clip's names. `data` is the whole state of the data: where in
        which epoch of which order the next sample lies.
        """
        data = {**self.loader.identity, "epoch": self.epoch, "position": self.position}
        return {
            "epoch": self.epoch,
            "name": self.config.log.name,
            "step": self.step,
            "skipped": self.engine.skipped,
            "data": data,
            "rng": self.streams(),
            "config": flatten(self.config),
        }
