"""`fastclip bench losses|attention|data`: operators and loading beside their rivals, in turn."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fastclip.device import choose_device

LossName = Literal["clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con"]


@dataclass(frozen=True)
class LossConfig:
    """Measure losses beside their rivals: time, peak memory, error, repeatability.

    Columns: milliseconds forward alone, and forward and backward (20th, 50th and 80th
    percentile); the ratio to fastclip; the share of the roof, which is the matrix products alone;
    MiB above the inputs; the relative error of dX against float64; whether its bits repeat.
    """

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


@dataclass(frozen=True)
class AttentionConfig:
    """Measure attention of short sequences beside torch's, every backend of it, and flash-attn.

    A line is a sequence length and an implementation: milliseconds forward, and forward and
    backward (median, 20th and 80th percentile); the ratio to fastclip; MiB above the
    inputs; the relative error of dQ against float64. bf16, twelve heads 64 wide.
    """

    lines: tuple[int, ...] = (50, 77, 197, 257, 577)
    """Lengths of the sequences; 77 is causal."""
    tokens: int = 262_144
    """Tokens of a batch."""
    rounds: int = 15
    """Rounds in which each rival runs once."""
    flex: bool = True
    """Include FlexAttention, which compiles first."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """Folder for the result's JSON file."""


@dataclass(frozen=True)
class DataConfig:
    """Measure loading beside its rivals, images a second from shards to batches of views.

    strong: two views each of a strong augmentation. plain: one view of open_clip's. A rival that is
    not installed is a row that says so.
    """

    data: Annotated[str | None, tyro.conf.Positional] = None
    """Shards of photographs, e.g. '/data/{00000..00007}.tar', local ones, at least as many as
    --workers; by default 512 generated pictures of 640 x 480."""
    size: int = 224
    """Side of the views, in pixels."""
    batch_size: int = 64
    """Images of a batch."""
    workers: int = 2
    """Loader processes, or DALI's threads."""
    rounds: int = 5
    """Epochs of each loader that count; one more goes before."""
    device: str = "auto"
    """Where DALI makes views: auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""


Config = (
    Annotated[
        LossConfig, tyro.conf.subcommand("losses", description="losses: time, peak memory, error")
    ]
    | Annotated[
        AttentionConfig,
        tyro.conf.subcommand("attention", description="attention: time, peak memory, error"),
    ]
    | Annotated[DataConfig, tyro.conf.subcommand("data", description="loading: images a second")]
)


def main(arguments: Sequence[str]) -> int:
    """Print a table; the status is 1 where an operator fails its quick check and is not timed."""
    arguments = list(arguments)
    if arguments[:1] not in (["losses"], ["attention"], ["data"], ["--help"], ["-h"]):
        arguments.insert(0, "losses")
    config = tyro.cli(Config, args=arguments, prog="fastclip bench")
    if isinstance(config, LossConfig):
        return _losses(config)
    return _attention(config) if isinstance(config, AttentionConfig) else _data(config)


def _attention(config: AttentionConfig) -> int:
    from fastclip.bench.attention import SHAPES, rivals
    from fastclip.bench.runner import Settings

    known = {shape[0]: shape for shape in SHAPES}
    if not config.lines or set(config.lines) - set(known):
        raise ValueError(f"--lines is {config.lines}; choose of {', '.join(map(str, known))}")
    if min(config.tokens, config.rounds) < 1:
        raise ValueError("--tokens and --rounds must be positive")
    chosen = choose_device(config.device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    settings = Settings(torch.bfloat16, rounds=config.rounds, warmup=3, device=chosen.type)
    shapes = [known[lines] for lines in config.lines]
    rivals(settings, config.output, config.tokens, shapes, config.flex)
    return 0


def _data(config: DataConfig) -> int:
    from fastclip.bench.data import DataSettings, as_json, run, write_photographs

    if min(config.size, config.batch_size, config.workers, config.rounds) < 1:
        raise ValueError("--size, --batch-size, --workers and --rounds must be at least 1")
    with tempfile.TemporaryDirectory(prefix="fastclip-bench-") as folder:
        shards = config.data or write_photographs(Path(folder), 512)
        settings = DataSettings(
            shards,
            config.size,
            config.batch_size,
            config.workers,
            config.rounds,
            str(choose_device(config.device)),
        )
        rows = run(settings)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(as_json(settings, rows), indent=1) + "\n")
    return 0


def _losses(config: LossConfig) -> int:
    from fastclip.bench.losses import run
    from fastclip.bench.runner import Settings, write_json

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
