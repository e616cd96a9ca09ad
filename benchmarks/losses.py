"""All losses beside their baselines: the loop and the table behind `fastclip bench losses`."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

import fastclip.bench.sigmoid as sigmoid
import fastclip.bench.similarity as similarity
import fastclip.bench.symmetric as symmetric
from fastclip.bench.runner import Operator, Row, Settings, measure, quick_check
from fastclip.messages import logger
from fastclip.ops import dense

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (*similarity.OPERATORS, *sigmoid.OPERATORS, *symmetric.OPERATORS)
}

# by whether S is held whole
WAYS: dict[bool, Callable[[], AbstractContextManager[None]]] = {
    True: dense.switched_on,
    False: dense.switched_off,
}


def greatest_error(settings: Settings) -> float:
    """What the quick check allows: the rounding of float32 through 512 sums, of bf16 or of tf32.

    A wrong gradient is off by orders more.
    """
    if settings.autocast or settings.dtype != torch.float32:
        return 2e-2
    exact = settings.device == "cpu" or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return 1e-5 if exact else 1e-2


def run(
    names: Sequence[str],
    sizes: Sequence[int],
    widths: Sequence[int],
    settings: Settings,
    add: Callable[[list[Row]], None],
    seconds: float | None = None,
) -> tuple[list[Row], list[str]]:
    """Measure all losses at all sizes; return the rows and the losses that failed their check.

    `add` receives the rows of each loss and size when they are measured. With `seconds` no size is
    begun after that much time; what was left out is printed.
    """
    started, rows = time.monotonic(), []
    limit = greatest_error(settings)
    failed = {
        (name, whole) for name in names for whole in WAYS if not _is_right(name, whole, settings)
    }
    wrong = [name for name, _ in sorted(failed)]
    for n in sizes:
        for width in widths:
            for name in names:
                # a way that is wrong spoils the sizes that take it
                if (name, is_whole(name, n, settings.device)) in failed:
                    continue
                if seconds is not None and time.monotonic() - started > seconds:
                    print(f"{name} n = {n:,} D = {width:,} left out: out of time", flush=True)
                    continue
                try:
                    measured = measure(OPERATORS[name], n, width, settings)
                except Exception as error:
                    logger.error(f"{name} at n = {n} could not be measured: {error}")
                    wrong.append(name)
                    failed |= {(name, whole) for whole in WAYS}
                    continue
                rows += measured
                add(measured)
                ours = measured[0]
                if ours.status != "ok" or not (ours.error or 0.0) < limit:
                    logger.error(f"{name} at n = {n} is wrong: {ours}")
                    wrong.append(name)
                    failed |= {(name, whole) for whole in WAYS}
                if settings.device == "cuda":
                    torch.cuda.empty_cache()
    return rows, list(dict.fromkeys(wrong))


def _is_right(name: str, whole: bool, settings: Settings) -> bool:
    """Whether a loss passes its quick check by one of `WAYS`."""
    way = f"with S {'whole' if whole else 'in tiles'}"
    try:
        with WAYS[whole]():
            found = quick_check(OPERATORS[name], settings)
    # what compiles has errors of its own
    except Exception as error:
        logger.error(f"{name} fails its quick check {way}: {error}")
        return False
    if found < greatest_error(settings):
        return True
    logger.error(f"{name} fails its quick check {way}: dX is off by {found:.1e}")
    return False


def is_whole(name: str, n: int, device: str) -> bool:
    """Whether a loss whose S has n rows holds S whole, by default."""
    return n * n <= dense.ENTRIES.get((device, name), 0)
