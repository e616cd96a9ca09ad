"""What a run shows while it trains: the bar, metrics, hints, notes on the data, a summary."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastclip.data.faults import FaultLog
from fastclip.data.training_samples import grouped_pairs
from fastclip.messages import WIDTH, counted, logger, shortened
from fastclip.train.health import Hints
from fastclip.train.log import RunLog, plot_loss
from fastclip.train.meter import Meter
from fastclip.train.optim import warmup_steps
from fastclip.train.state import TrainState
from fastclip.train.summary import LABEL, duration, labeled, summary


@dataclass(frozen=True)
class StepResult:
    """What a step was: its loss (0-d), its learning rate, the bytes received for the loss."""

    loss: Tensor
    rate: float
    received: int


class Report:
    """Bar and notes on standard error, metrics in the run's files; a context manager.

    Its methods are called on all ranks; what concerns all of them is shown by the first alone.

    Args:
        state: of the run, before its first step.

    Attributes:
        meter: of the speed, from the entrance on.
    """

    meter: Meter

    def __init__(self, state: TrainState) -> None:
        config = state.config
        self._state, self._first = state, state.world.is_first
        self._log = RunLog(state.folder, state.step, config) if self._first else None
        self._shown = False
        self._captions: Sequence[str] = ()
        self._held_out_captions: Sequence[str] = ()
        self._cut = _CutTexts()
        self._grouped = 0
        self._faults = FaultLog()
        self._chance = state.engine.objective.chance(state.step_samples)
        self._hints = Hints(self._chance, warmup_steps(config.optim, state.total_steps))

    def __enter__(self) -> "Report":
        # None: a bar where there is a terminal
        quiet = None if self._first else True
        self._bar = tqdm(
            total=self._state.last_step,
            initial=self._state.step,
            disable=quiet,
            dynamic_ncols=True,
            # its own estimate of the time left is by the last steps alone
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self.meter = Meter(self._state.step_samples)
        self._began, self._began_at = time.perf_counter(), self._state.step
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()
            try:
                plot_loss(self._state.folder)
            except OSError as failure:
                logger.warning(f"warning: the plot of the loss could not be written: {failure}")
            if error is None:
                seconds = time.perf_counter() - self._began
                captions = self._held_out_captions or self._captions
                logger.info("\n".join(summary(self._state, self._began_at, seconds, captions)))
        if self._faults.counts:
            # the places were shown when they came up
            logger.warning(f"skipped samples and shards: {self._faults.summary()}")
        # other ranks' are like the first's
        own = " in the first process's batches" if self._state.world.size > 1 else ""
        if self._cut.count and self._first:
            logger.warning(f"note: {self._cut.report(own)}")
        if self._grouped and self._first:
            logger.warning(f"note: {self._grouped} pairs{own} were duplicates")
        skipped = self._state.engine.skipped
        if skipped and self._first:
            logger.warning(f"float16 overflowed in {counted(skipped, 'step')}; skipped")

    def warn(self, text: str) -> None:
        """Show a warning of this rank."""
        self._say(f"warning: {text}", logging.WARNING)

    def batch(self, state: TrainState, batches: list[dict[str, Any]]) -> None:
        """Show two captions of the first step, and what is wrong with the data of each."""
        if self._first and not self._shown:
            self._shown = True
            self._show_captions(batches)
        for fault in self._faults.add([f for batch in batches for f in batch["faults"]]):
            self._say(f"skipped {fault}", logging.WARNING)
        ids = [batch["group"] for batch in batches if "group" in batch]
        self._grouped += grouped_pairs(torch.cat(ids)) if ids else 0
        if self._cut.add(batches):
            if self._first:
                self._say(f"note: {self._cut.notice(state.model.tokenizer)}", logging.WARNING)

    def step(self, state: TrainState, batches: list[dict[str, Any]], result: StepResult) -> None:
        """Count a step that was made, and write its metrics where they are due."""
        self.meter.step()
        self._bar.update()
        if state.config.log.log_sample_ids:
            self._write_sample_ids(state, batches)
        due = state.step % state.config.log.log_every_n_steps == 0
        if due or state.steps_done == state.total_steps:
            self._write_metrics(state, result)

    def evaluation(
        self, state: TrainState, metrics: dict[str, float], captions: Sequence[str] = ()
    ) -> None:
        """Write the metrics of an evaluation; on the first rank.

        Args:
            state: of the run.
            metrics: by name.
            captions: of the held-out data, for an example.
        """
        assert self._log is not None
        self._held_out_captions = captions
        self._log.metrics(state.step, metrics)
        lines = [f"epoch {state.epoch}, validation:"]
        for name, value in metrics.items():
            text = f"{name.removeprefix('val/')} {value:.4f}"
            if len(lines[-1]) + 2 + len(text) > 80:
                lines.append("   ")
            lines[-1] += f"  {text}"
        self._say("\n".join(lines))
        for hint in self._hints.observe_validation(state.step, metrics):
            self._say(f"hint: {hint}", logging.WARNING)

    def _show_captions(self, batches: list[dict[str, Any]]) -> None:
        found = batches[0].get("captions", ())
        self._captions = [text for texts in found for text in texts[:1]]
        for text in self._captions[:2]:
            # as the tokenizer gets it
            self._say("\n".join(labeled("caption", shortened(text, WIDTH - LABEL))))

    def _write_sample_ids(self, state: TrainState, batches: list[dict[str, Any]]) -> None:
        own = [key for batch in batches for key in batch["key"]]
        keys = [key for part in state.world.gather(own) for key in part]
        if self._log is not None:
            self._log.samples(state.step, keys)

    def _write_metrics(self, state: TrainState, result: StepResult) -> None:
        # where parameters are sharded all ranks have to ask
        scale = state.engine.logit_scale
        if self._log is None:
            return
        values = {
            "loss": result.loss.item(),
            "grad_norm": state.engine.norm.item(),
            "lr": result.rate,
            **({} if scale is None else {"logit_scale": scale}),
            **({} if self._chance is None else {"chance_loss": self._chance}),
            "epoch": state.epoch + state.step_in_epoch / state.loader.steps_per_epoch,
            "loss_exchange_mib": result.received / 2**20,
            **self.meter.read(state.world.device),
        }
        self._log.metrics(state.step, values)
        self._show(state.step, values)
        for hint in self._hints.observe(state.step, values):
            self._say(f"hint: {hint}", logging.WARNING)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        text = f"loss {values['loss']:.3f}  lr {values['lr']:.1e}  "
        # one of the two, so that a line has room in 80 columns
        if values["data_wait"] >= 0.1:
            text += f"data wait {values['data_wait']:.0%}  "
        elif "logit_scale" in values:
            text += f"scale {values['logit_scale']:.1f}  "
        speed = values["samples_per_second"]
        last = self._state.last_step
        text += f"{speed:.0f} samples/s  {duration(self.meter.pace.seconds(last - step))} left"
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            # lines for a log file instead of a bar
            logger.info(f"step {step}/{last}  {text}")

    def _say(self, text: str, level: int = logging.INFO) -> None:
        # above the bar
        with self._bar.external_write_mode():
            logger.log(level, text)


class _CutTexts:
    """Counts texts that are longer than the context; the first are noted."""

    def __init__(self) -> None:
        self.count, self.drawn = 0, 0

    def add(self, batches: list[dict[str, Any]]) -> bool:
        """Whether these are the first."""
        before = self.count
        for batch in batches:
            self.count += sum(batch.get("cut", ()))
            drawn = (*batch.get("captions", ()), *batch.get("false_captions", ()))
            self.drawn += sum(map(len, drawn))
        return before == 0 < self.count

    def notice(self, tokenizer: Any) -> str:
        """The note on the first."""
        length = getattr(tokenizer, "context_length", None)
        return (
            f"a text is longer than the context of {length} tokens, and is cut; the number of such "
            "texts is reported at the end"
        )

    def report(self, where: str) -> str:
        """The number of them; `where` says of which batches."""
        return (
            f"{self.count:,} of {self.drawn:,} texts{where} were cut to the context, each counted "
            "as often as it was drawn"
        )
