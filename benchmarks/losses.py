"""All losses beside their baselines: the loop and the table behind `fastclip bench losses`."""

import time
from collections.abc import Callable, Sequence

import torch

import fastclip.bench.sigmoid as sigmoid
import fastclip.bench.similarity as similarity
import fastclip.bench.symmetric as symmetric
from fastclip.bench.runner import Operator, Row, Settings, measure, quick_check
from fastclip.messages import logger

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (*similarity.OPERATORS, *sigmoid.OPERATORS, *symmetric.OPERATORS)
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
    started, rows, wrong = time.monotonic(), [], []
    limit = greatest_error(settings)
    for name in names:
        try:
            found = quick_check(OPERATORS[name], settings)
        # what compiles has errors of its own
        except Exception as error:
            logger.error(f"{name} fails its quick check: {error}")
            wrong.append(name)
            continue
        if not found < limit:
            logger.error(f"{name} fails its quick check: dX is off by {found:.1e}")
            wrong.append(name)
    for n in sizes:
        for width in widths:
            for name in (name for name in names if name not in wrong):
                if seconds is not None and time.monotonic() - started > seconds:
                    print(f"{name} n = {n:,} D = {width:,} left out: out of time", flush=True)
                    continue
                try:
                    measured = measure(OPERATORS[name], n, width, settings)
                except Exception as error:
                    logger.error(f"{name} at n = {n} could not be measured: {error}")
                    wrong.append(name)
                    continue
                rows += measured
                add(measured)
                ours = measured[0]
                if ours.status != "ok" or not (ours.error or 0.0) < limit:
                    logger.error(f"{name} at n = {n} is wrong: {ours}")
                    wrong.append(name)
                if settings.device == "cuda":
                    torch.cuda.empty_cache()
    return rows, wrong
