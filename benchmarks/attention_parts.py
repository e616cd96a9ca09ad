"""What the three parts of the attention benchmark have in common: shapes, tensors, compiling."""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as PoolTimeout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastclip.bench import records

HEADS, WIDTH = 12, 64
# lengths, causal or not: ViT-B/32, the text tower, ViT-B/16 at 224, ViT-L/14, ViT-L/14 at 336
SHAPES = ((50, False), (77, True), (197, False), (257, False), (577, False))
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def say(*words: Any) -> None:
    """Print at once, with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def inputs_of(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Tensor:
    """A packed projection (B, S, 3, H, D), normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, length, 3, heads, width)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)


def split(qkv: Tensor) -> list[Tensor]:
    """Its query, key and value, (B, H, S, D), each on its own."""
    return [t.contiguous() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0)]


def in_parallel(jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], stop: float) -> None:
    """Compile ahead in processes of their own, which leave it in the cache on disk.

    Args:
        jobs: functions of modules, and arguments, that launch what is to be compiled.
        stop: on `time.monotonic`'s clock; what is not compiled by then is left.
    """
    started = time.monotonic()
    processes = max(min((multiprocessing.cpu_count() or 2) - 1, len(jobs), 14), 1)
    say(f"compiling for {len(jobs)} jobs in {processes} processes")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    late = False
    try:
        futures = {pool.submit(_run, *job): job for job in jobs}
        for future in as_completed(futures, timeout=max(stop - time.monotonic(), 5)):
            problem = future.exception()
            if problem is not None:
                say(futures[future][1], f"failed to compile: {type(problem).__name__}",
                    str(problem).splitlines()[-1][:150] if str(problem) else "")  # fmt: skip
    except PoolTimeout:
        late = True
        say("the rest compiles when it is needed")
    finally:
        if late:
            # still at work, they would disturb what is timed next
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(wait=not late, cancel_futures=True)
    say(f"compiled in {time.monotonic() - started:.0f} s")


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(*arguments)
    torch.cuda.synchronize()


def write_findings(output: Path | None, name: str, device: str, **content: Any) -> None:
    """Write what a part found to a file of a folder, where there is one."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"environment": records.environment(device), **content}
        (output / name).write_text(json.dumps(content, indent=1) + "\n")
