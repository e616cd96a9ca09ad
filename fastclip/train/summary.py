"""What is said of a run at its end: how long it took, how well it did, and what to do next."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastclip.bounded import read_object
from fastclip.messages import counted, filled
from fastclip.models import checkpoint
from fastclip.train.best import best_step, scores_of
from fastclip.train.log import read_metrics
from fastclip.train.next_commands import next_commands, resume_command
from fastclip.train.state import TrainState

# the beginnings of the names of metrics that an evaluation has
EVALUATED = ("val/", "zeroshot/", "retrieval/")
LABEL = 10
"""Columns of a line, and of them those of its label."""


def summary(
    state: TrainState, began_at: int, seconds: float, captions: Sequence[str] = ()
) -> list[str]:
    """The lines of it, from the run's metrics.

    Args:
        state: of the run, after its last step.
        began_at: the step that this process began at.
        seconds: since then, evaluations and checkpoints included.
        captions: of the data that are searched, for an example.
    """
    metrics = read_metrics(state.folder)
    made = f"{state.step:,} of {counted(state.last_step, 'step')}"
    if began_at:
        made += f", {state.step - began_at:,} of them"
    speeds = [line["samples_per_second"] for line in metrics if "samples_per_second" in line]
    # the first ones are slow
    speed = f", {sorted(speeds)[len(speeds) // 2]:,.0f} samples/s" if speeds else ""
    complete = state.step >= state.last_step
    label = "done" if complete else "stopped"
    lines = {label: f"{made} in {duration(seconds)}{speed}"}
    losses = [line for line in metrics if "loss" in line]
    if losses:
        chance = losses[-1].get("chance_loss")
        lines["loss"] = f"{losses[-1]['loss']:.3f}" + (f" (chance {chance:.3f})" if chance else "")
    names = {name: None for line in metrics for name in line if name.startswith(EVALUATED)}
    scores = [_best_and_last(metrics, name) for name in names if "chance" not in name]
    # what a removal left behind, or somebody else, has no manifest
    found = checkpoint.steps_of(state.checkpoints)
    saved = max(found, key=found.__getitem__, default=None)
    # of a single step there is no plot
    written = [name for name in ("loss.png", "metrics.jsonl") if (state.folder / name).exists()]
    written += [str(saved.relative_to(state.folder))] if saved else []
    files = f"{state.folder}: {', '.join(written)}"
    resume = []
    if not complete:
        size = state.world.size
        resume = [f"# in {size} processes, as before"] if size > 1 else []
        resume.append(resume_command(state.config))
    after = next_commands(state.config, state.folder, captions)
    return [
        *(line for name, text in lines.items() for line in labeled(name, text)),
        *(line for i, score in enumerate(scores) for line in labeled("" if i else "scores", score)),
        *_best_checkpoint(state.folder),
        *labeled("files", files),
        "next",
        *(f"  {line}" for line in [*resume, *after]),
    ]


def labeled(label: str, text: str) -> list[str]:
    """The text beside its label, at most 80 columns wide; paths are not broken.

    Examples:
        >>> from fastclip.train.summary import labeled
        >>> labeled("step", "128 samples")
        ['step      128 samples']
    """
    return filled(f"{label:{LABEL}}", text, LABEL).splitlines()


def duration(seconds: float) -> str:
    """As 1:02:03, or 2:03.

    Examples:
        >>> from fastclip.train.summary import duration
        >>> duration(123.4), duration(3723)
        ('2:03', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _best_checkpoint(run: Path) -> list[str]:
    """Which it is, and how it is loaded; nothing where none is known."""
    file = run / checkpoint.BEST_FILE
    if not file.is_file():
        return []
    noted = read_object(file)
    loads = shlex.join(["--model", f"{run}@best"])
    return labeled("best", f"{noted['checkpoint']} by {noted['metric']}: {loads}")


def _best_and_last(metrics: list[dict[str, Any]], name: str) -> str:
    """A validation score's last value and, where another was better, the best."""
    scores = scores_of(metrics, name)
    step, last = best_step(scores, name), list(scores.values())[-1]
    before = ""
    if step is not None and scores[step] != last:
        before = f" (best {scores[step]:.4f}, at step {step:,})"
    return f"{name.removeprefix('val/')} {last:.4f}{before}"
