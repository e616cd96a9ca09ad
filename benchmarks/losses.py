"""All losses beside their baselines: the loop and the table behind `fastclip bench losses`."""

import time
from collections.abc import Callable, Iterator, Sequence

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

HEADER = (
    f"{'loss':9} {'n':>7} {'D':>5}  {'':27}{'forward':>9} {'p20':>9} {'p50':>9} {'p80':>9}"
    f" {'/ ours':>7} {'matmul':>6} {'MiB':>8} {'error':>8} bits"
)


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
    seconds: float | None = None,
    save: Callable[[list[Row]], None] | None = None,
) -> tuple[list[Row], list[str]]:
    """Print rows as they are measured; return them and the losses that failed their check.

    With `seconds` no size is begun after that much time; what was left out is printed. `save`
    receives all rows so far after each loss and size, so that a run cut short leaves them.
    """
    started, rows, wrong = time.monotonic(), [], []
    print(HEADER)
    limit = greatest_error(settings)
    for name in names:
        try:
            found = quick_check(OPERATORS[name], settings)
        except RuntimeError as error:
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
                    print(f"{name:9} {n:7} {width:5}  left out: out of time")
                    continue
                measured = measure(OPERATORS[name], n, width, settings)
                rows += measured
                if save is not None:
                    save(rows)
                for row in measured:
                    print(format_row(row), flush=True)
                ours = measured[0]
                if ours.status != "ok" or not (ours.error or 0.0) < limit:
                    logger.error(f"{name} at n = {n} is wrong: {ours}")
                    wrong.append(name)
                if settings.device == "cuda":
                    torch.cuda.empty_cache()
    return rows, wrong


def format_row(row: Row) -> str:
    """One line of the table."""
    start = f"{row.operator:9} {row.n:7} {row.width:5}  {row.baseline:27}"
    if row.status != "ok":
        return start + row.status
    return start + " ".join(_cells(row))


def _cells(row: Row) -> Iterator[str]:
    for seconds in (row.forward, row.p20, row.p50, row.p80):
        yield " " * 9 if seconds is None else f"{1e3 * seconds:9.2f}"
    yield " " * 7 if row.ratio is None else f"{row.ratio:7.2f}"
    yield " " * 6 if row.matmul_share is None else f"{row.matmul_share:6.0%}"
    yield " " * 8 if row.peak_bytes is None else f"{row.peak_bytes / 2**20:8.0f}"
    yield " " * 8 if row.error is None else f"{row.error:8.1e}"
    yield {None: "", True: "same", False: "vary"}[row.repeatable]
