"""The training loop, top to bottom."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastclip.data.loader import FaultLog
from fastclip.data.order import hash64
from fastclip.models import checkpoint
from fastclip.models.clip import create
from fastclip.train import state
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World, world
from fastclip.train.engine import TorchEngine
from fastclip.train.health import Hints, NonFiniteError
from fastclip.train.log import RunLog, plot_loss
from fastclip.train.optim import learning_rate
from fastclip.train.setup import (
    announce,
    build_loader,
    check_same_data,
    named,
    read_resumed,
    write_description,
)
from fastclip.train.validate import Validator


def train(config: TrainConfig) -> Path:
    """Train, alone or as one of torchrun's processes; returns the run's folder.

    Raises:
        FileExistsError: the run's folder exists and --resume is not given.
        NonFiniteError: a step's loss or gradient is not finite; nothing of it was applied.
        ValueError, FileNotFoundError: the configuration or the data cannot be used.
    """
    with world(config.device) as here:
        return _train(named(config, here), here)


def _train(config: TrainConfig, here: World) -> Path:
    run = Path(config.logs) / str(config.name)
    resumed = read_resumed(config, run, here)
    if config.deterministic:
        # cuBLAS reads this when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    state.seed_rng(config.seed)
    model = create(config.model, here.device, pretrained=config.pretrained)
    # convolutions are fastest with channels innermost, and nothing else minds
    model.model.to(memory_format=torch.channels_last)
    loader = build_loader(config, model, here)
    validator = Validator(config, model) if config.val_data and here.is_first else None
    engine = TorchEngine(model, config, here)
    step = epoch = step_in_epoch = 0
    if resumed is not None:
        check_same_data(resumed, loader, here)
        engine.load_state_dict(resumed)
        step, epoch = resumed["step"], resumed["data"]["epoch"]
        step_in_epoch = resumed["data"]["position"] // (config.batch_size * here.size)

    # no rank may look for the folder after the first has made it
    here.barrier()
    checkpoints = run / "checkpoints"
    if here.is_first:
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_description(run, config, model)
        announce(config, here, model.model, loader, step)
    log = RunLog(run, step, config) if here.is_first else None
    faults, hints = FaultLog(), Hints(config.batch_size * here.size, config.warmup)
    total_steps = config.epochs * loader.steps_per_epoch
    # last of the set-up, so that nothing of it draws from these streams
    if resumed is not None and here.rank < len(resumed["rng"]):
        state.restore_rng(resumed["rng"][here.rank], here.device)
    elif here.rank > 0:
        state.seed_rng(hash64(config.seed, here.rank))
    # as large as model and optimiser together
    del resumed

    def save(name: str) -> None:
        position = step_in_epoch * config.batch_size * here.size
        streams = here.gather(state.rng_state(here.device))
        if here.is_first:
            data = {**loader.identity, "epoch": epoch, "position": position}
            content = state.capture(engine, config, streams, data, step)
            checkpoint.write(checkpoints / name, content)
        here.barrier()

    quiet = None if here.is_first else True
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=quiet, dynamic_ncols=True)
    meter = _Meter(config.batch_size * here.size)
    try:
        while epoch < config.epochs:
            model.model.train()
            for batch in meter.waiting(loader.batches(epoch, step_in_epoch)):
                for fault in faults.add(batch["faults"]):
                    bar.write(f"skipped {fault}", file=sys.stderr)
                loss = _backward(engine, batch, step, checkpoints)
                done = epoch * loader.steps_per_epoch + step_in_epoch
                rate = learning_rate(config, done, total_steps)
                engine.update(rate)
                step, step_in_epoch = step + 1, step_in_epoch + 1
                meter.step()
                bar.update()
                if config.log_sample_ids:
                    keys = [key for part in here.gather(batch["key"]) for key in part]
                    if log is not None:
                        log.samples(step, keys)
                if log is not None and (
                    step % config.log_every_n_steps == 0 or done + 1 == total_steps
                ):
                    values = {
                        "loss": loss.item(),
                        "grad_norm": engine.norm.item(),
                        "lr": rate,
                        "logit_scale": engine.logit_scale,
                        "epoch": epoch + step_in_epoch / loader.steps_per_epoch,
                        **meter.read(here.device),
                    }
                    log.metrics(step, values)
                    _show(bar, step, values)
                    for hint in hints.observe(step, values):
                        bar.write(f"hint: {hint}", file=sys.stderr)
                # the end of an epoch has a checkpoint of its own
                at_end = step_in_epoch == loader.steps_per_epoch
                if config.save_every_steps and step % config.save_every_steps == 0 and not at_end:
                    save(f"step_{step:08d}.pt")
                    if here.is_first:
                        state.prune_step_checkpoints(checkpoints)

            epoch, step_in_epoch = epoch + 1, 0
            last = epoch == config.epochs
            due = epoch % config.save_frequency == 0 or last
            try:
                if validator and log and (epoch % config.val_frequency == 0 or last):
                    metrics = validator()
                    log.metrics(step, metrics)
                    bar.write(f"epoch {epoch}: {_readable(metrics)}", file=sys.stderr)
            finally:
                # an evaluation that fails must not cost the epoch
                if due:
                    save(f"epoch_{epoch}.pt")
            if due and config.delete_previous_checkpoint and here.is_first:
                state.prune_epoch_checkpoints(checkpoints, keep=epoch)
    finally:
        bar.close()
        if log is not None:
            log.close()
            plot_loss(run)
        if faults.counts:
            # the places were shown when they came up
            print(f"skipped samples and shards: {faults.summary()}", file=sys.stderr)
        if engine.skipped and here.is_first:
            print(f"float16 overflowed in {engine.skipped} steps; skipped", file=sys.stderr)
    return run


def _backward(
    engine: TorchEngine, batch: dict[str, Any], step: int, checkpoints: Path
) -> torch.Tensor:
    try:
        return engine.backward([batch])
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {step + 1}: {error} Checkpoints from before are in {checkpoints}."
        ) from error


def _show(bar: tqdm, step: int, values: dict[str, Any]) -> None:
    text = (
        f"loss {values['loss']:.3f}  {values['samples_per_second']:.0f} samples/s  "
        f"data wait {values['data_wait']:.0%}  peak {values['peak_memory_gib']:.1f} GiB"
    )
    bar.set_postfix_str(text)
    if bar.disable:
        # no terminal: lines for a log file instead of a bar
        print(f"step {step}/{bar.total}  {text}", file=sys.stderr)


def _readable(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())


class _Meter:
    """Samples a second and the share of time spent waiting for data, between two readings."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def waiting(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def step(self) -> None:
        self.steps += 1

    def read(self, device: torch.device) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            # kilobytes on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        values = {
            "samples_per_second": self.steps * self.batch_size / elapsed,
            "data_wait": self.waited / elapsed,
            "peak_memory_gib": peak / 2**30,
        }
        self._reset()
        return values
