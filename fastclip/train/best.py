"""The best of a run's evaluations, by one of their metrics."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastclip.train.config import TrainConfig


def best_metric(config: TrainConfig) -> str:
    """The name of the metric that chooses a run's best epoch."""
    default = "val/acc1" if config.model.objective == "classify" else "val/loss"
    return config.checkpoint.best_metric or default


def scores_of(metrics: Iterable[Mapping[str, Any]], name: str) -> dict[int, float]:
    """A metric's values by step, from the lines of metrics.jsonl."""
    return {line["step"]: line[name] for line in metrics if name in line}


def lower_is_better(name: str) -> bool:
    """Whether the best value of a metric is its lowest: of a loss.

    Examples:
        >>> from fastclip.train.best import lower_is_better
        >>> lower_is_better("val/loss_ema"), lower_is_better("zeroshot/gloss/acc1")
        (True, False)
    """
    return "loss" in name.rpartition("/")[2]


def best_step(scores: Mapping[int, float], name: str) -> int | None:
    """The step with the best value of a metric, the first of equals; None where none is finite.

    Examples:
        >>> from fastclip.train.best import best_step
        >>> best_step({8: 2.5, 16: 2.0, 24: float("nan")}, "val/loss")
        16
    """
    sign = -1 if lower_is_better(name) else 1
    finite = {step: sign * value for step, value in scores.items() if math.isfinite(value)}
    return max(finite, key=finite.__getitem__, default=None)
