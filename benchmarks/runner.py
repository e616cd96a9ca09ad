"""Timing rivals fairly: one process, interleaved rounds, medians with spread.

Machines drift while they are measured; running A, B, C, A, B, C, ... lets every rival see the
same drift, so that ratios of medians mean something.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastclip


@dataclass(frozen=True)
class Rival:
    """One way to do the work: `run()` is timed, and computes the loss and all gradients."""

    name: str
    run: Callable[[], Any]


@dataclass
class Timing:
    """Seconds of one rival over all rounds, and the ratio of its median to the baseline's."""

    name: str
    p20: float
    p50: float
    p80: float
    rounds: int
    ratio: float | None = None


def interleave(
    rivals: Sequence[Rival], *, rounds: int, warmup: int = 2, device: str = "cpu"
) -> list[Timing]:
    """Time all rivals in turn, `rounds` times; the last rival is the baseline of the ratios."""
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for turn in range(warmup + rounds):
        for rival in rivals:
            _synchronize(device)
            started = time.perf_counter()
            rival.run()
            _synchronize(device)
            if turn >= warmup:
                seconds[rival.name].append(time.perf_counter() - started)
    timings = []
    for name, values in seconds.items():
        p20, p50, p80 = (_quantile(values, q) for q in (0.2, 0.5, 0.8))
        timings.append(Timing(name, p20, p50, p80, rounds))
    for timing in timings:
        timing.ratio = timing.p50 / timings[-1].p50
    return timings


def environment(device: str) -> dict[str, Any]:
    """What a result depends on: versions, device, threads and time."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastclip": fastclip.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, results: list[dict[str, Any]], device: str) -> None:
    """Write the results with the environment in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(device), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _quantile(values: list[float], q: float) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[round(q * 10) - 1]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 1} cores"
