"""The training loop, top to bottom."""

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastclip.models import checkpoint
from fastclip.ops.collectives import count_bytes
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World, world
from fastclip.train.health import NonFiniteError
from fastclip.train.log import read_metrics
from fastclip.train.next_commands import resume_command
from fastclip.train.optim import learning_rate
from fastclip.train.report import Report, StepResult
from fastclip.train.run_directory import named
from fastclip.train.saving import keep_newest_and_best, prune_step_checkpoints, save
from fastclip.train.start import start
from fastclip.train.state import TrainState
from fastclip.train.stop import StoppedError, StopSignals
from fastclip.train.summary import EVALUATED
from fastclip.train.validate import Evaluation
from fastclip.train.watch import Watch


def train(config: TrainConfig) -> Path:
    """Train, alone or as one of several processes; returns the run directory.

    Raises:
        FileExistsError: the run directory exists and --resume is not given, or another process
            trains in it.
        NonFiniteError: a step's loss or gradient is not finite; nothing of it was applied.
        StoppedError: SIGTERM or SIGUSR1 asked to stop; a checkpoint was saved.
        DeadRankError: another rank has ended.
        OSError: the last checkpoint of the run could not be written, or a loader process died.
        ValueError, FileNotFoundError: the configuration or the data cannot be used.
    """
    options = config.distributed
    limits = {"dead_after": options.dead_rank_timeout, "data_within": options.data_timeout}
    with (
        StopSignals() as stop,
        world(options.device) as here,
        Watch(here, **limits) as watch,
        ExitStack() as around,
    ):
        config = named(config, here)
        run, signals = _train(config, here, stop, watch, around)
    if signals:
        how = "" if here.size == 1 else f"start {here.size} processes of "
        raise StoppedError(
            f"{' and '.join(signals)} received; to resume: {how}{resume_command(config)}"
        )
    return run


def _train(
    config: TrainConfig, here: World, stop: StopSignals, watch: Watch, around: ExitStack
) -> tuple[Path, list[str]]:
    """The run directory, and the signals that ended it before its time."""
    state, evaluation, report = start(config, here, around)
    stop.training = True
    with report:
        complete = True
        if evaluation is not None and _lacks_evaluation(state, evaluation):
            report.meter.pause()
            complete = evaluate(state, evaluation, report, stop)
            if complete and state.world.is_first:
                keep_newest_and_best(state, report.warn)
            report.meter.resume()
        while complete and state.epoch < config.optim.epochs:
            train_epoch(state, report, stop, watch)
            complete = state.epoch_is_done and end_of_epoch(state, evaluation, report, stop)
    received = [] if complete else here.gather(stop.received.name if stop.received else "")
    return state.folder, sorted(set(received) - {""})


def train_epoch(state: TrainState, report: Report, stop: StopSignals, watch: Watch) -> None:
    """The steps that are left of an epoch, fewer after a signal, and the checkpoints between."""
    every = state.config.checkpoint.save_every_steps
    state.model.model.train()
    state.engine.objective.begin_epoch(state.epoch)
    steps = state.loader.steps(state.epoch, state.step_in_epoch)
    waiting = functools.partial(watch.waiting_for_data, state.loader.waiting_for)
    for batches in report.meter.waiting(steps, waiting):
        report.batch(state, batches)
        result = train_step(state, batches)
        report.step(state, batches, result)
        stopping = state.world.any(stop.received is not None)
        # the end of an epoch has a checkpoint of its own
        if state.epoch_is_done:
            return
        if stopping or (every and state.step % every == 0):
            name = f"step_{state.step:08d}"
            report.meter.pause()
            saved = save(state, name, needed=stopping, warn=report.warn)
            if saved and state.world.is_first:
                prune_step_checkpoints(state.checkpoints)
            report.meter.resume()
        if stopping:
            return


def train_step(state: TrainState, batches: list[dict[str, Any]]) -> StepResult:
    """One update by the micro-batches of a step.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was applied.
    """
    try:
        with count_bytes() as exchange:
            frozen = state.engine.objective.frozen(state.step)
            loss = state.engine.backward(batches, frozen)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {state.step + 1}: {error} Checkpoints from before are in {state.checkpoints}."
        ) from error
    rate = learning_rate(state.config.optim, state.steps_done, state.total_steps)
    state.engine.update(rate)
    state.step += 1
    state.position += state.step_samples
    return StepResult(loss, rate, exchange.received)


def end_of_epoch(
    state: TrainState, evaluation: Evaluation | None, report: Report, stop: StopSignals
) -> bool:
    """Save and evaluate where the configuration says so, and stand before the next epoch.

    Returns:
        Whether the run continues, or is complete; if not, a signal asks it to stop.
    """
    checkpoints = state.config.checkpoint
    state.epoch, state.position = state.epoch + 1, 0
    name, last = f"epoch_{state.epoch}", state.epoch == state.config.optim.epochs
    report.meter.pause()
    stopping = state.world.any(stop.received is not None)
    needed = last or stopping
    saved = False
    # first: an evaluation that fails, or is killed, must not cost the epoch
    if needed or state.epoch % checkpoints.save_frequency == 0:
        saved = save(state, name, needed=needed, warn=report.warn)
    complete = last or not stopping
    if evaluation is not None and _is_due(state, evaluation):
        complete = not stopping and evaluate(state, evaluation, report, stop)
        if not complete and not saved:
            saved = save(state, name, needed=True, warn=report.warn)
    if saved and state.world.is_first:
        keep_newest_and_best(state, report.warn)
    report.meter.resume()
    return complete


def evaluate(state: TrainState, evaluation: Evaluation, report: Report, stop: StopSignals) -> bool:
    """Measure what is due at an epoch's end, unless a signal asks to stop.

    Returns:
        Whether it was measured; if not, the resumed run does it.
    """
    # at the end everything is measured
    last = state.epoch == state.config.optim.epochs
    metrics = evaluation(state.engine, None if last else state.epoch, around=stop.at_once)
    if metrics is not None:
        report.evaluation(state, metrics, evaluation.captions)
    # the first rank alone has metrics
    return state.world.gather(metrics is not None)[0]


def _is_due(state: TrainState, evaluation: Evaluation) -> bool:
    return state.epoch == state.config.optim.epochs or evaluation.is_due(state.epoch)


def _lacks_evaluation(state: TrainState, evaluation: Evaluation) -> bool:
    """Whether this run was stopped between an epoch's checkpoint and its evaluation."""
    at_end = state.epoch > 0 and state.position == 0 and _is_due(state, evaluation)
    # a run that branches off from another begins without its scores
    scored = any(
        line["step"] == state.step and any(name.startswith(EVALUATED) for name in line)
        for line in read_metrics(state.folder)
    )
    missing = bool(checkpoint.named(state.checkpoints, f"epoch_{state.epoch}")) and not scored
    return at_end and state.world.gather(missing)[0]
