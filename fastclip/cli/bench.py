"""`fastclip bench losses`: operators beside their rivals, timed in turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fastclip.device import choose_device

LossName = Literal["clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con"]


@dataclass(frozen=True)
class BenchConfig:
    """Measure losses beside their rivals: time, peak memory, error, repeatability.

    Columns: milliseconds forward alone, and forward and backward (20th, 50th and 80th
    percentile); the ratio to fastclip; the share of the roof, which is the matrix products alone;
    MiB above the inputs; the relative error of dX against float64; whether its bits repeat.
    """

    what: Annotated[Literal["losses"], tyro.conf.Positional] = "losses"
    """losses: the contrastive losses."""
    loss: tuple[LossName, ...] = ("clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con")
    """Which ones."""
    n: tuple[int, ...] = (1024, 4096)
    """Rows (of all views together); a multiple of 4."""
    width: tuple[int, ...] = (512,)
    """Feature widths."""
    scale: float = 14.3
    """Logit scale of the inputs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the features."""
    autocast: bool = False
    """Under bf16 autocast."""
    compiled: bool = True
    """Include rivals under torch.compile."""
    rounds: int = 15
    """Rounds in which each rival runs once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""


def main(arguments: Sequence[str]) -> int:
    """Print a table; an operator whose quick check fails is not timed, and the status is 1."""
    from fastclip.bench.losses import run
    from fastclip.bench.runner import Settings, write_json

    config = tyro.cli(BenchConfig, args=list(arguments), prog="fastclip bench")
    if any(n < 4 or n % 4 for n in config.n):
        raise ValueError(f"--n is {config.n}; give multiples of 4")
    if config.rounds < 1 or min(config.width) < 1:
        raise ValueError("--rounds and --width must be positive")
    chosen = choose_device(config.device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    settings = Settings(
        dtype=getattr(torch, config.dtype),
        autocast=config.autocast,
        scale=config.scale,
        rounds=config.rounds,
        device=chosen.type,
        compiled=config.compiled,
    )
    rows, wrong = run(config.loss, config.n, config.width, settings)
    if config.output is not None:
        write_json(config.output, rows, settings)
    return 1 if wrong else 0
