"""The training loop, top to bottom."""

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastclip.models import checkpoint
from fastclip.ops.collectives import count_bytes
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import DeadRankError, World, world
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
            complete = evaluate(state, evaluation, report, stop, saved=True)
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
    state.model.model.train()
    state.engine.objective.begin_epoch(state.epoch)
    steps = state.loader.steps(state.epoch, state.step_in_epoch)
    waiting = functools.partial(watch.waiting_for_data, state.loader.waiting_for)
    for batches in report.meter.waiting(steps, waiting):
        report.batch(state, batches)
        result = train_step(state, batches)
        report.step(state, batches, result)
        stopping = state.world.any(stop.received is not None)
        # its end has a checkpoint of its own; asked once more, the loader ends the epoch too, and
        # keeps its processes and pipelines for the next
        if state.epoch_is_done:
            continue
        if stopping or _is_step_saved(state):
            report.meter.pause()
            _save_step(state, report, needed=stopping)
            report.meter.resume()
        if stopping:
            return


def _is_step_saved(state: TrainState) -> bool:
    """Whether --save-every-steps asks for a checkpoint of this moment."""
    every = state.config.checkpoint.save_every_steps
    return every is not None and state.step % every == 0


def _save_step(state: TrainState, report: Report, *, needed: bool) -> None:
    """Save a checkpoint between those of epochs, and delete older ones."""
    name = f"step_{state.step:08d}"
    saved = save(state, name, needed=needed, warn=report.warn)
    if saved and state.world.is_first:
        prune_step_checkpoints(state.checkpoints)


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

    Raises:
        Exception: see `evaluate`.
        OSError: a checkpoint that is needed could not be written.
    """
    checkpoints = state.config.checkpoint
    state.epoch, state.position = state.epoch + 1, 0
    name, last = f"epoch_{state.epoch}", state.epoch == state.config.optim.epochs
    report.meter.pause()
    stopping = state.world.any(stop.received is not None)
    needed = last or stopping
    saved = False
    # first: a kill in the evaluation must not cost the epoch
    if needed or state.epoch % checkpoints.save_frequency == 0:
        saved = save(state, name, needed=needed, warn=report.warn)
    elif _is_step_saved(state):
        _save_step(state, report, needed=False)
    complete = last or not stopping
    if evaluation is not None and _is_due(state, evaluation):
        complete = evaluate(state, evaluation, report, stop, saved=saved)
        if not complete and not saved:
            saved = save(state, name, needed=True, warn=report.warn)
    if saved and state.world.is_first:
        keep_newest_and_best(state, report.warn)
    report.meter.resume()
    return complete


def evaluate(
    state: TrainState, evaluation: Evaluation, report: Report, stop: StopSignals, *, saved: bool
) -> bool:
    """Measure what is due at an epoch's end, unless a signal asks to stop.

    Args:
        state, evaluation, report, stop: of the run.
        saved: whether there is a checkpoint of the epoch; where the evaluation fails, there is one
            afterwards.

    Returns:
        Whether it was measured; if not, the resumed run does it.

    Raises:
        Exception: why the first rank failed.
        DeadRankError: the same on the others.
    """
    # one may have come while a checkpoint was written
    if state.world.any(stop.received is not None):
        return False
    weights = state.engine.weights(), state.engine.averaged_weights()
    measured = False
    failure: Exception | None = None
    if state.world.is_first:
        # at the end everything is measured
        epoch = None if state.epoch == state.config.optim.epochs else state.epoch
        try:
            metrics = stop.at_once(functools.partial(evaluation, *weights, epoch))
            if metrics is not None:
                report.evaluation(state, metrics, evaluation.captions)
                measured = True
        except Exception as error:
            failure = error
    said = f"{type(failure).__name__}: {failure}" if failure else ""
    measured, said = state.world.gather((measured, said))[0]
    if said:
        if not saved:
            save(state, f"epoch_{state.epoch}", needed=True, warn=report.warn)
        raise failure or DeadRankError(f"rank 0 failed: {said}")
    return measured


def _is_due(state: TrainState, evaluation: Evaluation) -> bool:
    return state.epoch == state.config.optim.epochs or evaluation.is_due(state.epoch)


def _lacks_evaluation(state: TrainState, evaluation: Evaluation) -> bool:
    """Whether this run was stopped between an epoch's checkpoint and its evaluation."""
    if state.epoch == 0 or state.position > 0 or not _is_due(state, evaluation):
        return False
    # a run that branches off from another begins without its scores
    scored = any(
        line["step"] == state.step and any(name.startswith(EVALUATED) for name in line)
        for line in read_metrics(state.folder)
    )
    own = state.step in checkpoint.steps_of(state.checkpoints).values()
    return state.world.gather(own and not scored)[0]
