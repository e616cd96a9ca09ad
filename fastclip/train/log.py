"""What a run writes down: metrics.jsonl, TensorBoard, sample ids, the loss plot."""

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from fastclip.atomic import append, write_text, writing
from fastclip.bounded import read_json_lines
from fastclip.flags import flatten
from fastclip.train.config import TrainConfig

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
WANDB_FILE = "wandb_id.txt"


class RunLog:
    """Appends metrics to `metrics.jsonl`, one JSON object a line, and to TensorBoard.

    Args:
        folder: the run directory.
        step: the step the run stands at; lines of later steps, which a killed run may have left,
            are dropped, so that a resumed run's file reads like an uninterrupted one's.
        config: says which of TensorBoard and wandb are wanted, and whether `samples` writes.
    """

    def __init__(self, folder: Path, step: int, config: TrainConfig) -> None:
        self.folder = folder
        wanted = config.log
        self._wandb = _start_wandb(folder, step, config) if "wandb" in wanted.reporters else None
        self._metrics = _open_from(folder / METRICS_FILE, step)
        self._samples = _open_from(folder / SAMPLES_FILE, step) if wanted.log_sample_ids else None
        self._writer: Any = None
        if "tensorboard" in wanted.reporters:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def metrics(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Write one line; numbers also go to TensorBoard under their names."""
        _append(self._metrics, {"step": step, **values})
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def samples(self, step: int, keys: list[str]) -> None:
        """Write down which samples a step saw, over all processes; needs log_sample_ids."""
        assert self._samples is not None
        _append(self._samples, {"step": step, "keys": keys})

    def close(self) -> None:
        """Flush and close every file."""
        self._metrics.close()
        if self._samples is not None:
            self._samples.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_reporters(config: TrainConfig) -> None:
    """Find out whether what --report-to names is installed, before anything is built.

    Raises:
        ValueError: it is not.
    """
    for name in sorted(config.log.reporters):
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--report-to {name} needs the package: pip install {name}; or --report-to none"
            ) from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    return list(_read_lines(folder / METRICS_FILE))


def plot_loss(folder: Path) -> Path | None:
    """Draw loss.png from the metrics; None where there are fewer than two points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(folder)
    if sum("loss" in line for line in lines) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    levels = {}
    for prefix, name, marker in (("", "training", "-"), ("val/", "validation", "o-")):
        points = [
            (line["step"], line[f"{prefix}loss"]) for line in lines if f"{prefix}loss" in line
        ]
        if not points:
            continue
        (curve,) = axes.plot(*zip(*points, strict=True), marker, linewidth=1, markersize=3)
        chances = [line[f"{prefix}chance_loss"] for line in lines if f"{prefix}chance_loss" in line]
        # a loss grows with the batch it is of: only beside its own chance does it say anything
        batch = f"batches of {round(math.exp(chances[-1])):,}" if chances else ""
        curve.set_label(f"{name} ({batch})" if chances else name)
        if chances:
            levels[batch] = chances[-1]
    for batch, level in levels.items():
        label = f"chance in {batch}: {level:.2f}"
        axes.axhline(level, color="gray", linewidth=1, linestyle="--", zorder=0, label=label)
    axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "loss.png"
    with writing(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)
    return path


def _start_wandb(folder: Path, step: int, config: TrainConfig) -> Any:
    import wandb

    # not the run's name: another run there may have had it, and would be continued
    file = folder / WANDB_FILE
    if step == 0 or not file.is_file():
        write_text(file, secrets.token_hex(8))
    return wandb.init(
        project=config.log.wandb_project_name,
        notes=config.log.wandb_notes,
        id=file.read_text(),
        name=config.log.name,
        dir=str(folder),
        config=flatten(config),
        resume="allow",
    )


def _append(file: IO[bytes], value: dict[str, Any]) -> None:
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()


def _open_from(path: Path, step: int) -> IO[bytes]:
    with writing(path) as file:
        for line in _read_lines(path):
            if line["step"] <= step:
                _append(file, line)
    return append(path)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = read_json_lines(path) if path.exists() else iter(())
    return (line for line in lines if isinstance(line.get("step"), int))
