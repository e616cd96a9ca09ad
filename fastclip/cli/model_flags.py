"""Which model a command uses."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastclip.evaluate.interpolation import has_two_heads
from fastclip.models.checkpoint import run_of
from fastclip.models.clip import Model
from fastclip.models.open import is_run, open_model


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags of every command that uses a trained model."""

    model: str
    """A run directory (its latest checkpoint is used), RUN@best, or one of its checkpoints; a
    folder of `fastclip convert to-hub`; an open_clip model, with --pretrained; hf-hub:ORG/NAME, or
    local-dir:FOLDER of the same files."""
    pretrained: str | None = None
    """For an open_clip model: the name of its weights, or a checkpoint file."""
    average: bool = False
    """Use the averaged weights of a run with --ema."""
    trust_checkpoint: bool = False
    """Read a DeepSpeed checkpoint: pickles, which can run arbitrary code when they are loaded."""
    head_weight: float | None = None
    """For a model with weak and strong heads: the weight of the weak head in the similarity."""

    @property
    def is_run(self) -> bool:
        """Whether the model is of a run directory; exported weights are of none."""
        if not is_run(self.model, self.pretrained):
            return False
        return (run_of(Path(self.model)) / "checkpoints").is_dir()

    def open(self, device: torch.device) -> Model:
        """The model, in evaluation mode.

        Raises:
            ValueError, FileNotFoundError: see `open_model`; or the weight of the weak head is not
                in [0, 1], or there is no such head.
        """
        options = (self.pretrained, self.average, self.trust_checkpoint)
        model = open_model(self.model, device, *options)
        if self.head_weight is not None:
            set_head_weight(model, self.head_weight)
        return model

    def folder(self, name: str) -> Path:
        """Where files about the model go: a folder of the run, or ./NAME/MODEL_PRETRAINED."""
        if self.is_run:
            return run_of(Path(self.model)) / name
        named = f"{self.model}_{self.pretrained or ''}"
        return Path(name, re.sub(r"[^\w.-]+", "_", named).strip("_"))


def set_head_weight(model: Model, weight: float) -> None:
    """Set the weak head's share in the similarity of a model with weak and strong heads.

    Raises:
        ValueError: the share is outside [0, 1], or the model has no two heads.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"--head-weight is {weight}; give one in [0, 1]")
    if not has_two_heads(model):
        raise ValueError("--head-weight: the model has no weak and strong heads; leave it out")
    model.model.get_buffer("head_weight").fill_(weight)
