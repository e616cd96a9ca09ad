"""The training loop, top to bottom."""

import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastclip.data.faults import FaultLog
from fastclip.data.order import hash64
from fastclip.models.build import build
from fastclip.ops.collectives import count_bytes
from fastclip.train import state
from fastclip.train.claim import claim
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World, world
from fastclip.train.engine import Engine, build_engine
from fastclip.train.health import Hints, NonFiniteError
from fastclip.train.layers import exchange_layers
from fastclip.train.log import RunLog, plot_loss
from fastclip.train.optim import learning_rate
from fastclip.train.setup import (
    announce,
    begin_classifier,
    build_loader,
    check_same_data,
    class_names,
    named,
    read_resumed,
    write_description,
)
from fastclip.train.stop import StoppedError, StopSignals
from fastclip.train.validate import Validator
from fastclip.train.watch import Watch


def train(config: TrainConfig) -> Path:
    """Train, alone or as one of several processes; returns the run's folder.

    Raises:
        FileExistsError: the run's folder exists and --resume is not given, or another process
            trains in it.
        NonFiniteError: a step's loss or gradient is not finite; nothing of it was applied.
        StoppedError: SIGTERM or SIGUSR1 asked to stop; a checkpoint was saved.
        DeadRankError: another rank has ended.
        OSError: the last checkpoint of the run could not be written, or a loader process died.
        ValueError, FileNotFoundError: the configuration or the data cannot be used.
    """
    limits = {"dead_after": config.dead_rank_timeout, "data_within": config.data_timeout}
    with (
        StopSignals() as stop,
        world(config.device) as here,
        Watch(here, **limits) as watch,
        ExitStack() as around,
    ):
        run, signals = _train(named(config, here), here, stop, watch, around)
    if signals:
        raise StoppedError(f"{' and '.join(signals)} received; go on with --name {run.name}")
    return run


def _train(
    config: TrainConfig, here: World, stop: StopSignals, watch: Watch, around: ExitStack
) -> tuple[Path, list[str]]:
    """The run's folder, and the signals that ended it before its time."""
    run = Path(config.logs) / str(config.name)
    # before anything is looked for in it: two starts of one name must not both begin
    _claim(run, here, around)
    resumed_path, resumed = read_resumed(config, run, here)
    if config.deterministic:
        # cuBLAS reads this when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    state.seed_rng(config.seed)
    classes = class_names(config)
    plan: dict[str, Any] = {"siglip": config.siglip, "classes": classes}
    model = build(
        config.model,
        config,
        here.device,
        pretrained=config.pretrained,
        trust_checkpoint=config.trust_checkpoint,
        **plan,
    )
    begin_classifier(config, model, classes)
    exchange_layers(model.model, config)
    # convolutions are fastest with channels innermost, and nothing else minds
    model.model.to(memory_format=torch.channels_last)
    loader = build_loader(config, model, classes, here)
    around.enter_context(loader.naming_the_dead())
    # where the engine shards or rounds the model's parameters, whole ones go to another
    judged_model, validator = model, None
    if config.val_data and here.is_first:
        if config.deepspeed:
            judged_model = build(config.model, config.lasting(), here.device, **plan)
        validator = Validator(config, judged_model)
    engine = build_engine(model, config, here)
    averaged_validator = None
    if validator and engine.average is not None:
        averaged = judged_model._replace(model=engine.average.model)
        averaged_validator = Validator(config, averaged)
    samples = config.step_samples(here.size)
    step = epoch = step_in_epoch = 0
    if resumed_path is not None and resumed is not None:
        check_same_data(resumed, loader, here)
        engine.load(resumed_path, resumed)
        step, epoch = resumed["step"], resumed["data"]["epoch"]
        step_in_epoch = resumed["data"]["position"] // samples

    # no rank may look for the folder after the first has made it
    here.barrier()
    checkpoints = run / "checkpoints"
    if here.is_first:
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_description(run, config, model, classes)
        announce(config, here, model.model, loader, step)
    log = RunLog(run, step, config) if here.is_first else None
    cut = _CutTexts()
    faults, hints = FaultLog(), Hints(engine.objective.chance(samples), config.warmup)
    total_steps = config.epochs * loader.steps_per_epoch
    # last of the set-up, so that nothing of it draws from these streams
    if resumed is not None and here.rank < len(resumed["rng"]):
        state.restore_rng(resumed["rng"][here.rank], here.device)
    elif here.rank > 0:
        state.seed_rng(hash64(config.seed, here.rank))
    # as large as model and optimiser together
    del resumed

    def save(name: str, *, needed: bool) -> bool:
        """Whether it was written; a failure ends the run only where the checkpoint is needed."""
        position = step_in_epoch * samples
        streams = here.gather(state.rng_state(here.device))
        data = {**loader.identity, "epoch": epoch, "position": position}
        try:
            engine.save(checkpoints / name, state.training_state(config, streams, data, step))
        except OSError as error:
            kept = f"checkpoint {name} could not be written: {error}; earlier ones are kept"
            if needed:
                raise OSError(f"{kept} in {checkpoints}") from error
            bar.write(f"warning: {kept}, the run goes on", file=sys.stderr)
            return False
        return True

    quiet = None if here.is_first else True
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=quiet, dynamic_ncols=True)
    meter = _Meter(samples)
    stopping = False
    try:
        while epoch < config.epochs and not stopping:
            model.model.train()
            steps = loader.steps(epoch, step_in_epoch)
            waiting = functools.partial(watch.waiting_for_data, loader.waiting_for)
            for batches in meter.waiting(steps, waiting):
                for fault in faults.add([f for batch in batches for f in batch["faults"]]):
                    bar.write(f"skipped {fault}", file=sys.stderr)
                if cut.add(batches):
                    bar.write(f"note: {cut.notice(model.tokenizer)}", file=sys.stderr)
                with count_bytes() as exchange:
                    loss = _backward(engine, batches, step, checkpoints)
                done = epoch * loader.steps_per_epoch + step_in_epoch
                rate = learning_rate(config, done, total_steps)
                engine.update(rate)
                step, step_in_epoch = step + 1, step_in_epoch + 1
                meter.step()
                bar.update()
                if config.log_sample_ids:
                    own = [key for batch in batches for key in batch["key"]]
                    keys = [key for part in here.gather(own) for key in part]
                    if log is not None:
                        log.samples(step, keys)
                telling = step % config.log_every_n_steps == 0 or done + 1 == total_steps
                # where parameters are sharded all ranks have to ask
                scale = engine.logit_scale if telling else None
                if log is not None and telling:
                    values = {
                        "loss": loss.item(),
                        "grad_norm": engine.norm.item(),
                        "lr": rate,
                        **({} if scale is None else {"logit_scale": scale}),
                        "epoch": epoch + step_in_epoch / loader.steps_per_epoch,
                        "loss_exchange_mib": exchange.received / 2**20,
                        **meter.read(here.device),
                    }
                    log.metrics(step, values)
                    _show(bar, step, values)
                    for hint in hints.observe(step, values):
                        bar.write(f"hint: {hint}", file=sys.stderr)
                stopping = here.any(stop.received is not None)
                # the end of an epoch has a checkpoint of its own
                if step_in_epoch == loader.steps_per_epoch:
                    break
                due = config.save_every_steps and step % config.save_every_steps == 0
                if due or stopping:
                    saved = save(f"step_{step:08d}", needed=stopping)
                    if saved and here.is_first:
                        state.prune_step_checkpoints(checkpoints)
                if stopping:
                    break
            if step_in_epoch < loader.steps_per_epoch:
                break

            epoch, step_in_epoch = epoch + 1, 0
            last = epoch == config.epochs or stopping
            due = epoch % config.save_frequency == 0 or last
            saved = False
            meter.pause()
            try:
                judged = not stopping and (epoch % config.val_frequency == 0 or last)
                if config.val_data and judged:
                    weights = engine.weights()
                    if weights:
                        judged_model.model.load_state_dict(weights)
                if validator and log and judged:
                    metrics = validator()
                    if averaged_validator:
                        of_average = averaged_validator()
                        metrics |= {f"{name}_ema": value for name, value in of_average.items()}
                    log.metrics(step, metrics)
                    bar.write(f"epoch {epoch}: {_readable(metrics)}", file=sys.stderr)
            finally:
                # an evaluation that fails must not cost the epoch
                if due:
                    saved = save(f"epoch_{epoch}", needed=last)
                meter.resume()
            if saved and config.delete_previous_checkpoint and here.is_first:
                state.prune_epoch_checkpoints(checkpoints, keep=epoch)
    finally:
        bar.close()
        if log is not None:
            log.close()
            plot_loss(run)
        if faults.counts:
            # the places were shown when they came up
            print(f"skipped samples and shards: {faults.summary()}", file=sys.stderr)
        if cut.count:
            print(f"note: {cut.count} texts were cut to the context", file=sys.stderr)
        if engine.skipped and here.is_first:
            print(f"float16 overflowed in {engine.skipped} steps; skipped", file=sys.stderr)
    # a run that came to its end was not stopped
    unfinished = stopping and epoch < config.epochs
    received = here.gather(stop.received.name if stop.received else "") if unfinished else []
    return run, sorted(set(received) - {""})


def _claim(run: Path, here: World, around: ExitStack) -> None:
    """Hold the run directory on the first rank until the end; where that fails, all raise."""
    failure = None
    if here.is_first:
        try:
            around.enter_context(claim(run))
        except FileExistsError as error:
            failure = str(error)
    failure = here.gather(failure)[0]
    if failure:
        raise FileExistsError(failure)


def _backward(
    engine: Engine, batches: list[dict[str, Any]], step: int, checkpoints: Path
) -> torch.Tensor:
    try:
        return engine.backward(batches)
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


class _CutTexts:
    """Counts texts that were longer than the context; the first are told."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, batches: list[dict[str, Any]]) -> bool:
        """Whether these are the first."""
        before = self.count
        self.count += sum(sum(batch.get("cut", ())) for batch in batches)
        return before == 0 < self.count

    def notice(self, tokenizer: Any) -> str:
        """What is said of the first."""
        length = getattr(tokenizer, "context_length", None)
        return (
            f"a text is longer than the context of {length} tokens, and is cut; the number of such "
            "texts is told at the end"
        )


class _Meter:
    """Samples a second and the share of time spent waiting for data, between two readings.

    What lies between `pause` and `resume`, an evaluation and a checkpoint, is no part of either.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def waiting(
        self,
        steps: Iterator[list[dict[str, Any]]],
        watched: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[list[dict[str, Any]]]:
        while True:
            before = time.perf_counter()
            with watched():
                batches = next(steps, None)
            self.waited += time.perf_counter() - before
            if batches is None:
                return
            yield batches

    def step(self) -> None:
        self.steps += 1

    def pause(self) -> None:
        self.paused = time.perf_counter()

    def resume(self) -> None:
        self.started += time.perf_counter() - self.paused

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
