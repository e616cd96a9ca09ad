"""`fastclip bench train-step|data`: what surrounds the operators, beside open_clip."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.cli.bench.operators import place
from fastclip.device import choose_device


@dataclass(frozen=True)
class TrainStepConfig:
    """Measure a whole training step beside the open_clip loop, with the same weights and batch.

    Columns: milliseconds a step (the median; ±, half of what lies between the 20th and 80th
    percentile); samples a second; how many times as fast as this row fastclip is; peak MiB above
    weights and optimizer; the relative difference of the loss after the first call from
    open_clip's. Rows are fastclip's engine; the open_clip loop with AdamW as its
    trainer makes it, with torch's fused AdamW, and with fastclip's loss (`patch_open_clip`).
    """

    towers: tuple[str, ...] = ("ViT-mini-16px:16", "ViT-mini-16px:256", "ViT-B-32:16")
    """Models and their batch sizes, MODEL:BATCH."""
    precision: Literal["fp32", "amp", "amp_bf16"] = "fp32"
    """Precision of the towers."""
    grad_clip_norm: float | None = None
    """Maximum gradient norm; without it open_clip does not compute the norm."""
    steps: int | None = None
    """Training steps of one call; by default 4, or 1 where one takes more than half a second."""
    rounds: int = 15
    """Calls of each trainer that count, in turn."""
    warmup: int = 2
    """Calls of each before."""
    quick: bool = False
    """A small model and few rounds; overrides --towers and --rounds."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> int:
        """Measure, print, write."""
        from fastclip.bench.screen import Rows
        from fastclip.bench.train_step import StepSettings, run

        if self.quick:
            small = {"towers": ("ViT-mini-16px:16", "ViT-mini-16px:64"), "rounds": 5}
            return replace(self, **small, quick=False).run()  # type: ignore[arg-type]
        towers = [_tower(text) for text in self.towers]
        if min(1 if self.steps is None else self.steps, self.rounds) < 1 or self.warmup < 0:
            raise ValueError("--steps and --rounds must be positive, --warmup at least 0")
        device = place(self.device)
        settings = StepSettings(
            self.precision, self.grad_clip_norm, self.steps, self.rounds, self.warmup, device
        )
        with Rows("train-step", settings, device, self.output) as rows:
            run(towers, settings, rows.add)
        return 0


def _tower(text: str) -> tuple[str, int]:
    model, _, batch_size = text.rpartition(":")
    if not model or not batch_size.isdigit() or int(batch_size) < 2:
        raise ValueError(
            f"--towers {text}: give MODEL:BATCH with a batch of 2 or more, e.g. ViT-B-32:16"
        )
    return model, int(batch_size)


@dataclass(frozen=True)
class DataConfig:
    """Measure loading beside its baselines, images a second from shards to batches of views.

    strong: two views each of a strong augmentation. plain: one view, augmented as in open_clip.
    Columns: images a second (the median; ±, half of what lies between the 20th and 80th
    percentile); how many times as fast as this row fastclip is.
    """

    data: Annotated[str | None, tyro.conf.Positional] = None
    """Shards of photographs, e.g. '/data/{00000..00007}.tar', local ones, at least as many as
    --workers; by default 512 generated pictures of 640 x 480."""
    size: int = 224
    """Side of the views, in pixels."""
    batch_size: int = 64
    """Images of a batch."""
    workers: int = 2
    """Loader processes, or DALI's threads."""
    rounds: int = 5
    """Epochs of each loader that count; one more goes before."""
    quick: bool = False
    """Few pictures and rounds; overrides --batch-size and --rounds."""
    device: str = "auto"
    """Where DALI makes views: auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> int:
        """Measure, print, write."""
        from fastclip.bench import records
        from fastclip.bench.data import DataSettings, run, write_photographs
        from fastclip.bench.screen import Rows

        batch_size, rounds = (16, 3) if self.quick else (self.batch_size, self.rounds)
        if min(self.size, batch_size, self.workers, rounds) < 1:
            raise ValueError("--size, --batch-size, --workers and --rounds must be at least 1")
        records.prepare(self.output)
        device = choose_device(self.device)
        with tempfile.TemporaryDirectory(prefix="fastclip-bench-") as folder:
            shards = self.data or write_photographs(Path(folder), 64 if self.quick else 512)
            settings = DataSettings(
                shards, self.size, batch_size, self.workers, rounds, str(device)
            )
            # where they lie is nobody's business
            named = replace(settings, shards=Path(settings.shards).name)
            with Rows("data", named, device.type, self.output) as rows:
                run(settings, rows.add)
        return 0
