"""`fastclip bench losses|attention|memory|collectives`: operators beside their baselines."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastclip.device import choose_device

LossName = Literal["clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con"]


@dataclass(frozen=True)
class LossConfig:
    """Measure losses beside their baselines: time, peak memory, error, repeatability.

    Columns: milliseconds forward alone, and forward and backward (the median; ±, half of what
    lies between the 20th and 80th percentile); how many times as fast as this row fastclip is;
    the matmul share, which is the time of the matrix products alone over this median; peak extra
    MiB; the relative error of dX against float64. --output has every row after each size, and
    whether its bits repeat.
    """

    loss: tuple[LossName, ...] = ("clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con")
    """Losses to measure."""
    n: tuple[int, ...] = (1024, 4096)
    """Batch sizes (rows of all views together), multiples of 4."""
    width: tuple[int, ...] = (512,)
    """Feature widths."""
    scale: float = 14.3
    """Logit scale of the inputs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the features."""
    autocast: bool = False
    """Run under bf16 autocast."""
    compiled: bool = True
    """Include baselines under torch.compile."""
    rounds: int = 15
    """Rounds in which each baseline runs once; 14 times as many for steps below 2 ms."""
    keep_bytes: int | None = None
    """Bytes for exponentials that fastclip's losses keep for the backward; None is their
    default."""
    quick: bool = False
    """Small sizes and few rounds; overrides --n, --width, --rounds and --compiled."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> int:
        """Measure, print, write."""
        from fastclip.bench.losses import run
        from fastclip.bench.runner import Settings
        from fastclip.bench.screen import Rows
        from fastclip.ops.checks import check_keep_bytes

        if self.quick:
            small = {"n": (256, 512, 1024), "width": (128,), "rounds": 3, "compiled": False}
            return replace(self, **small, quick=False).run()  # type: ignore[arg-type]
        _check(self.n, self.width, self.rounds)
        check_keep_bytes(self.keep_bytes)
        settings = Settings(
            dtype=getattr(torch, self.dtype),
            autocast=self.autocast,
            scale=self.scale,
            rounds=self.rounds,
            device=place(self.device),
            compiled=self.compiled,
            keep_bytes=self.keep_bytes,
        )
        with Rows("losses", settings, settings.device, self.output) as rows:
            _, wrong = run(self.loss, self.n, self.width, settings, rows.add)
        return 1 if wrong else 0


@dataclass(frozen=True)
class AttentionConfig:
    """Measure attention of short sequences beside torch's, every backend of it, and flash-attn.

    Columns: milliseconds forward, and forward and backward (the median; ±, half of what lies
    between the 20th and 80th percentile); how many times as fast as this row fastclip is; peak
    extra MiB; the relative error of dQ against float64. bf16, twelve heads 64 wide.
    """

    lengths: tuple[int, ...] = (50, 77, 197, 257, 577)
    """Lengths of the sequences; 77 is causal."""
    tokens: int | None = None
    """Tokens of a batch; by default 262,144 on a GPU, 8,192 on a CPU."""
    rounds: int = 15
    """Rounds in which each baseline runs once."""
    flex: bool = True
    """Include FlexAttention, which has to compile first."""
    quick: bool = False
    """Few and short sequences; overrides --lengths, --tokens, --rounds and --flex."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> int:
        """Measure, print, write."""
        from fastclip.bench.attention import SHAPES, baselines
        from fastclip.bench.runner import Settings
        from fastclip.bench.screen import Rows

        if self.quick:
            small = {"lengths": (50, 77), "tokens": 400, "rounds": 3, "flex": False}
            return replace(self, **small, quick=False).run()  # type: ignore[arg-type]
        known = {shape[0]: shape for shape in SHAPES}
        if not self.lengths or set(self.lengths) - set(known):
            raise ValueError(f"--lengths is {_typed(self.lengths)}; choose from {_typed(known)}")
        device = place(self.device)
        default = 262_144 if device == "cuda" else 8_192
        tokens = default if self.tokens is None else self.tokens
        if min(tokens, self.rounds) < 1:
            raise ValueError("--tokens and --rounds must be positive")
        settings = Settings(torch.bfloat16, rounds=self.rounds, warmup=3, device=device)
        shapes = [known[length] for length in self.lengths]
        with Rows("attention", settings, device, self.output, tokens=tokens) as rows:
            baselines(settings, rows.add, tokens, shapes, self.flex)
        return 0


@dataclass(frozen=True)
class MemoryConfig:
    """Measure the losses' memory against the batch: bytes kept for the backward, and the peak.

    Columns: MiB that autograd keeps, the inputs left out; the power of n by which they grew since
    the size before; peak extra MiB, and its power; how many times less than this row's peak
    fastclip's is.

    fastclip's losses are measured as in large batches: without what they keep of small ones, the
    similarity matrix or its exponentials.
    """

    loss: tuple[LossName, ...] = ("clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con")
    """Losses to measure."""
    n: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Batch sizes (rows of all views together), multiples of 4."""
    width: tuple[int, ...] = (512,)
    """Feature widths."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the features."""
    autocast: bool = False
    """Run under bf16 autocast."""
    compiled: bool = True
    """Include baselines under torch.compile."""
    quick: bool = False
    """Small sizes; overrides --n, --width and --compiled."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> int:
        """Measure, print, write."""
        from fastclip.bench.memory import run
        from fastclip.bench.runner import Settings
        from fastclip.bench.screen import Rows

        if self.quick:
            small = {"n": (256, 512, 1024), "width": (128,), "compiled": False}
            return replace(self, **small, quick=False).run()  # type: ignore[arg-type]
        _check(self.n, self.width, 1)
        settings = Settings(
            dtype=getattr(torch, self.dtype),
            autocast=self.autocast,
            rounds=1,
            device=place(self.device),
            compiled=self.compiled,
        )
        with Rows("memory", settings, settings.device, self.output) as rows:
            run(self.loss, self.n, self.width, settings, rows.add)
        return 0


@dataclass(frozen=True)
class CollectivesConfig:
    """Measure losses over several processes beside open_clip: bytes, time, memory, error.

    Columns: MiB that a process receives, forward and backward; milliseconds of the slowest process
    (the median; ±, half of what lies between the 20th and 80th percentile); how many times as fast
    as this row fastclip's gather is; MiB kept for the backward; the relative error of dX against
    one process in float64. Processes are real: NCCL on GPUs, else gloo, whose times on one machine
    say nothing of a network.
    """

    loss: tuple[Literal["clip", "siglip"], ...] = ("clip", "siglip")
    """Losses to measure."""
    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes."""
    n: tuple[int, ...] = (1024,)
    """Pairs per process."""
    width: int = 512
    """Feature width."""
    rounds: int = 15
    """Rounds in which each baseline runs once."""
    quick: bool = False
    """Small batches and few rounds; overrides --n, --width and --rounds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses GPUs if there is one for each process."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> int:
        """Measure, print, write."""
        from fastclip.bench.collectives import CollectiveSettings, run
        from fastclip.bench.screen import Rows

        if self.quick:
            small = {"n": (128,), "width": 64, "rounds": 3}
            return replace(self, **small, quick=False).run()  # type: ignore[arg-type]
        if not self.ranks or min(self.ranks) < 2:
            raise ValueError(f"--ranks is {_typed(self.ranks)}; give 2 or more")
        if not self.n or min(*self.n, self.width, self.rounds) < 1:
            raise ValueError("--n, --width and --rounds must be positive")
        device = self.device
        if device == "auto":
            enough = torch.cuda.device_count() >= max(self.ranks)
            device = "cuda" if enough and choose_device("auto").type == "cuda" else "cpu"
        settings = CollectiveSettings(rounds=self.rounds, device=device)
        with Rows("collectives", settings, device, self.output) as rows:
            run(self.loss, self.ranks, self.n, self.width, settings, rows.add)
        return 0


def place(device: str) -> str:
    """The device's kind, made the current one where it is a GPU."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen.type


def _typed(values: Iterable[int]) -> str:
    """Numbers as they are typed."""
    return " ".join(map(str, values)) or "empty"


def _check(n: tuple[int, ...], width: tuple[int, ...], rounds: int) -> None:
    if not n or any(rows < 4 or rows % 4 for rows in n):
        raise ValueError(f"--n is {_typed(n)}; give multiples of 4")
    if rounds < 1 or not width or min(width) < 1:
        raise ValueError("--rounds and --width must be positive")
