"""`fastclip bench losses`: operators beside their rivals, timed in turn."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastclip.device import choose_device

# Relative error of dX without and with autocast: float32's rounding through 512 sums, or that of
# the features to bf16. A wrong gradient is off by orders more.
GREATEST_ERROR = {False: 1e-5, True: 2e-2}


@dataclass(frozen=True)
class BenchConfig:
    """Time operators beside their rivals, forward and backward."""

    what: Annotated[Literal["losses"], tyro.conf.Positional] = "losses"
    """losses: the CLIP loss."""
    n: tuple[int, ...] = (2048, 8192)
    """Batch sizes."""
    width: tuple[int, ...] = (512,)
    """Feature widths."""
    scale: float = 14.3
    """Logit scale of the inputs."""
    autocast: bool = False
    """Under bf16 autocast instead of in float32."""
    rounds: int = 15
    """Rounds in which each rival runs once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""


def main(arguments: Sequence[str]) -> int:
    """Print a table; an operator whose quick check fails is not timed, and the status is 1."""
    import fastclip.bench.similarity as similarity
    from fastclip.bench.runner import interleave, write_json

    config = tyro.cli(BenchConfig, args=list(arguments), prog="fastclip bench")
    chosen = choose_device(config.device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    device = chosen.type
    found = similarity.error(512, 64, device, config.autocast)
    if not found < GREATEST_ERROR[config.autocast]:
        print(f"clip_loss fails its quick check: dX is off by {found:.1e}", file=sys.stderr)
        return 1
    results: list[dict[str, Any]] = []
    print(f"{'N':>7} {'D':>5}  {'':20} {'p20':>8} {'p50':>8} {'p80':>8}  ms, / open_clip")
    for n in config.n:
        for width in config.width:
            inputs = similarity.make_inputs(n, width, torch.float32, device, config.scale)
            rivals = similarity.rivals(inputs, config.autocast)
            for timing in interleave(rivals, rounds=config.rounds, device=device):
                row = {"n": n, "width": width, "autocast": config.autocast, **asdict(timing)}
                results.append(row)
                milliseconds = " ".join(f"{1e3 * row[q]:8.1f}" for q in ("p20", "p50", "p80"))
                print(f"{n:7} {width:5}  {timing.name:20} {milliseconds}  {timing.ratio:.2f}")
    if config.output is not None:
        write_json(config.output, results, device)
    return 0
