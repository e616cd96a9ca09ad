"""A whole training step beside the open_clip trainer: towers, loss, backward and AdamW.

    fastclip                    the engine and the objective of `fastclip train`
    open_clip                   open_clip's own `train_one_epoch`, AdamW as its trainer makes it
    open_clip, fused AdamW      the same with torch's fused AdamW, which is what fastclip takes
    open_clip, patch_open_clip  the same as open_clip, with fastclip's loss under it

All begin with the same weights and get the same batch in every step; loading is not measured. A
call is some steps, and reports the loss once: the open_clip loop logs its first and last step.
Each does what it does for its users: fastclip takes pixels as bytes and normalizes them in the
step, which the open_clip loader has done before; its towers have channels innermost; it computes
the gradient's norm in every step, which open_clip does only where the gradient is clipped; and it
checks loss and norm for NaN.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastclip
from fastclip.bench.runner import (
    Settings,
    interleave,
    peak_since,
    quantile,
    reset_peak,
    status_of,
)
from fastclip.models.clip import Model, create
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.optim import learning_rate
from fastclip.train.options import OptimOptions
from fastclip.train.select_engine import build_engine

OURS, THEIRS = "fastclip", "open_clip"
FUSED, PATCHED = "open_clip, fused AdamW", "open_clip, patch_open_clip"
# far more than are measured: the learning rate is that of the first steps of a long run
_TOTAL_STEPS = 1_000_000
_WARMUP = 1000

Call = Callable[[], float]


@dataclass(frozen=True)
class StepSettings:
    """How to measure.

    Attributes:
        precision: of the towers: fp32, amp or amp_bf16.
        grad_clip_norm: as of both trainers' flag; None does not clip.
        steps: training steps of one call; None: 4, or 1 where one takes more than half a second.
        rounds: calls of each that count.
        warmup: calls of each before.
        device: cpu or cuda.
    """

    precision: str = "fp32"
    grad_clip_norm: float | None = None
    steps: int | None = None
    rounds: int = 15
    warmup: int = 2
    device: str = "cpu"


@dataclass
class StepRow:
    """One trainer: seconds a step, and how it compares with open_clip.

    Attributes:
        steps: of one call.
        ratio: open_clip's median over this one's: its speedup over open_clip.
        loss_difference: of the losses after the first call, relative to open_clip.
        peak_bytes: of a call after the first, above what it finds: weights, optimizer and the last
            gradients, which every trainer frees as the call begins.
    """

    model: str
    batch_size: int
    baseline: str
    steps: int
    status: str = "ok"
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    samples_per_second: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    loss_difference: float | None = None


def measure(model: str, batch_size: int, settings: StepSettings) -> list[StepRow]:
    """All trainers with one model and batch, fastclip first."""
    batch = Batch(create(model), batch_size)
    steps = settings.steps or _steps(model, batch, settings)
    settings = replace(settings, steps=steps)
    rows, calls = [], {}
    for name, build in TRAINERS.items():
        row = StepRow(model, batch_size, name, steps)
        rows.append(row)
        try:
            call = build(model, batch, settings)
            row.loss = call()
            before = reset_peak(settings.device)
            call()
            row.peak_bytes = peak_since(settings.device, before)
        except Exception as error:
            # the open_clip trainer needs packages of its own
            if name == OURS:
                raise
            row.status = status_of(error)
            continue
        calls[name] = call
    # trainers read the loss on the host: behind a delay they would hide work of theirs
    how = Settings(warmup=settings.warmup, device=settings.device, delayed=False)
    times, failed = interleave(calls, settings.rounds, how)
    named = {row.baseline: row for row in rows}
    for name, found in times.items():
        row, each = named[name], [seconds / steps for seconds in found]
        row.p20, row.p50, row.p80 = (quantile(each, q) for q in (0.2, 0.5, 0.8))
        row.samples_per_second = batch_size / row.p50
    theirs = named[THEIRS]
    for row in rows:
        row.status = failed.get(row.baseline, row.status)
        if row.p50 is not None and theirs.p50 is not None:
            row.ratio = theirs.p50 / row.p50
        if row.loss is not None and theirs.loss is not None:
            row.loss_difference = abs(row.loss - theirs.loss) / abs(theirs.loss)
    return rows


def _steps(model: str, batch: "Batch", settings: StepSettings) -> int:
    """How many steps of fastclip's a call should have."""
    call = _fastclip(model, batch, replace(settings, steps=1))
    call()
    started = time.perf_counter()
    call()
    return 4 if time.perf_counter() - started < 0.5 else 1


class Batch:
    """One batch of pictures of noise with captions, in the form that each trainer wants.

    Attributes:
        pixels: (B, 3, H, W), uint8.
        images: the same, normalized, float32.
        texts: (B, context length) tokens.
    """

    def __init__(self, model: Model, size: int) -> None:
        config = model.preprocess_config
        side = config["size"] if isinstance(config["size"], int) else config["size"][0]
        generator = torch.Generator().manual_seed(size)
        self.pixels = torch.randint(
            0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator
        )
        mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
        self.images = (self.pixels / 255 - mean) / std
        self.texts = model.tokenizer([f"a picture of noise, number {i}" for i in range(size)])


def _fresh(name: str, device: str) -> Model:
    """The model with the same weights each time."""
    torch.manual_seed(0)
    return create(name, device)


def _fastclip(name: str, batch: Batch, settings: StepSettings) -> Call:
    """What `fastclip.train.loop` does with a batch, from where the loader hands it over."""
    config = TrainConfig.from_flat(
        model=name,
        batch_size=len(batch.texts),
        precision=settings.precision,
        grad_clip_norm=settings.grad_clip_norm,
        warmup=_WARMUP,
        device=settings.device,
    )
    model = _fresh(name, settings.device)
    model.model.to(memory_format=torch.channels_last)
    engine = build_engine(model, config, World(0, 1, torch.device(settings.device)))
    keys = [str(i) for i in range(len(batch.texts))]
    batches = [{"images": [batch.pixels], "texts": [batch.texts], "key": keys}]
    done = 0

    steps = settings.steps or 1

    def call() -> float:
        nonlocal done
        model.model.train()
        for number in range(steps):
            loss = engine.backward(batches)
            engine.update(learning_rate(config.optim, done, _TOTAL_STEPS))
            done += 1
            if number in (0, steps - 1):
                reported = loss.item(), engine.norm.item(), engine.logit_scale
        return reported[0]

    return call


class _Repeated:
    """A dataloader, as the open_clip trainer wants it, that gives one batch again and again."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.num_batches = batch, steps
        self.num_samples = steps * len(batch.texts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(self.batch.images, self.batch.texts)] * self.num_batches)


class _Losses:
    """What stands for TensorBoard's writer: it keeps the last loss."""

    last = math.nan

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Keep it where it is the loss."""
        if name == "train/loss":
            self.last = value


def _open_clip(
    name: str, batch: Batch, settings: StepSettings, *, fused: bool = False, patched: bool = False
) -> Call:
    from open_clip import ClipLoss
    from open_clip_train.data import DataInfo
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    defaults = OptimOptions()
    model = _fresh(name, settings.device).model
    optimizer = _their_optimizer(model, defaults, fused)
    amp, steps = settings.precision == "amp", settings.steps or 1
    arguments = Namespace(
        device=settings.device,
        precision=settings.precision,
        grad_clip_norm=settings.grad_clip_norm,
        batch_size=len(batch.texts),
        accum_freq=1,
        distill=False,
        horovod=False,
        log_every_n_steps=steps,
        rank=0,
        skip_scheduler=False,
        wandb=False,
        world_size=1,
    )
    scaler = torch.amp.GradScaler(settings.device) if amp else None
    scheduler = cosine_lr(optimizer, defaults.lr, _WARMUP, _TOTAL_STEPS)
    data = {"train": DataInfo(_Repeated(batch, steps))}
    loss, writer = ClipLoss(), _Losses()
    epoch = 0

    def call() -> float:
        nonlocal epoch
        with fastclip.patch_open_clip() if patched else nullcontext():
            train_one_epoch(
                model, data, loss, epoch, optimizer, scaler, scheduler, None, arguments, writer
            )
        epoch += 1
        return writer.last

    return call


def _their_optimizer(model: nn.Module, options: OptimOptions, fused: bool) -> torch.optim.Optimizer:
    """AdamW over the groups that the open_clip trainer makes, with its default options."""
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))
        (plain if kept or "logit_scale" in name else decayed).append(parameter)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": options.wd},
    ]
    kind: dict[str, Any] = {"fused": True} if fused else {}
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, **kind)


def _fused(name: str, batch: Batch, settings: StepSettings) -> Call:
    return _open_clip(name, batch, settings, fused=True)


def _patched(name: str, batch: Batch, settings: StepSettings) -> Call:
    return _open_clip(name, batch, settings, patched=True)


TRAINERS: dict[str, Callable[[str, Batch, StepSettings], Call]] = {
    OURS: _fastclip,
    THEIRS: _open_clip,
    FUSED: _fused,
    PATCHED: _patched,
}


def run(
    towers: Sequence[tuple[str, int]],
    settings: StepSettings,
    add: Callable[[list[StepRow]], None],
) -> list[StepRow]:
    """Measure every (model, batch size); `add` receives the rows of each."""
    rows = []
    for model, batch_size in towers:
        found = measure(model, batch_size, settings)
        rows += found
        add(found)
    return rows
