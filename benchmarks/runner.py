"""Measuring baselines fairly: one process, interleaved rounds, medians with spread, errors beside.

Machines drift while they are measured; running A, B, C, A, B, C, ... lets every baseline see the
same drift, so that ratios of medians mean something. A baseline that is not installed, runs out of
memory or fails is a row that says so.
"""

import ctypes
import functools
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops.chunks import chunk_rows, chunks
from fastclip.ops.gemm import add_product, product


class CannotRunHere(ValueError):
    """What cannot be measured on this machine, such as more processes than it has GPUs."""


Inputs = list[Tensor]
LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Baseline:
    """Another way to the same loss: `build(inputs)` imports what it needs and returns it."""

    name: str
    build: Callable[[Inputs], LossFunction]
    largest: int | None = None
    """Rows beyond which it is not tried."""
    normalizes: bool = False
    """Whether it normalizes inside: its gradient then has no part along the features."""


def compiled(build: Callable[[Inputs], LossFunction]) -> Callable[[Inputs], LossFunction]:
    """What builds the same loss under torch.compile, with nothing compiled before."""

    def made(inputs: Inputs) -> LossFunction:
        torch._dynamo.reset()
        return torch.compile(build(inputs))

    return made


@dataclass(frozen=True)
class Operator:
    """A loss to measure: inputs, fastclip's function, baselines, and the products it needs.

    `make(n, width, scale)` returns float32 leaves, features first. `products` counts the matrix
    products of rows x rows x width that dense exact computation needs: (S, dX, dY).
    """

    name: str
    make: Callable[[int, int, float], Inputs]
    ours: LossFunction
    baselines: tuple[Baseline, ...]
    products: tuple[int, int, int]


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    dtype: torch.dtype = torch.float32
    autocast: bool = False
    scale: float = 14.3
    rounds: int = 15
    warmup: int = 2
    device: str = "cpu"
    compiled: bool = True
    """Whether baselines that compile first are included."""
    keep_bytes: int | None = None
    """Of fastclip's losses; None is their default."""
    baselines: bool = True
    """Whether anything beside fastclip is measured."""
    delayed: bool = True
    """Whether a GPU's work is queued behind a sleep, so that the time is the device's alone. Else a
    call is timed from one synchronization to the next, the host's work included."""


@dataclass
class Row:
    """One baseline at one size: seconds forward and backward, bytes, and how exact it is.

    `ratio` is this median over fastclip's, `matmul_share` the bare products' over this one. On a
    GPU the times are the device's; `host` is the median time in which the host queued the work,
    and `launches` the number of kernels, copies and fills.
    """

    operator: str
    baseline: str
    n: int
    width: int
    status: str = "ok"
    forward: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    host: float | None = None
    launches: int | None = None
    ratio: float | None = None
    matmul_share: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    repeatable: bool | None = None


OURS, MATMUL = "fastclip", "bare products"

# A step below so many seconds is measured in so many times the rounds: chance weighs more in it.
SHORT_STEP = 2e-3
MORE_ROUNDS = 14
# And a GPU's above so many in few rounds: they would take most of a session's time.
LONG_CALL, FEW_ROUNDS = 0.3, 3


def clustered(count: int, rows: int, width: int, correlation: float = 0.3) -> Inputs:
    """Blocks of unit rows; each block's have about the given cosine with the first's."""
    # on the default device: copies of large blocks from the host would take longer than the timing
    generator = torch.Generator(torch.get_default_device()).manual_seed(rows + width)

    def unit() -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)

    first, away = unit(), (1 - correlation**2) ** 0.5
    others = [F.normalize(correlation * first + away * unit(), dim=-1) for _ in range(count - 1)]
    return [first, *others]


def measure(operator: Operator, n: int, width: int, settings: Settings) -> list[Row]:
    """All baselines of one operator at one size, fastclip first, the matmul time last."""
    if settings.keep_bytes is not None:
        keeping = functools.partial(operator.ours, keep_bytes=settings.keep_bytes)
        operator = replace(operator, ours=keeping)
    inputs = leaves(operator, n, width, settings)
    exact = _exact_gradient(operator, inputs)
    rows: list[Row] = []
    runs: dict[str, Callable[[bool], None]] = {}
    for baseline in candidates(operator):
        row = Row(operator.name, baseline.name, n, width)
        rows.append(row)
        row.status = why_not(baseline, n, settings) or "ok"
        if row.status == "ok":
            runs[baseline.name] = _try_out(baseline, row, inputs, exact, settings)
    rows.append(Row(operator.name, MATMUL, n, width))
    try:
        runs[MATMUL] = _bare(operator, inputs, settings)
    except Exception as error:
        # without the bare products the losses' own times still count
        rows[-1].status = status_of(error)
    alive = {row.baseline: runs[row.baseline] for row in rows if row.status == "ok"}
    # forward alone says what evaluation costs
    forward = {name: lambda run=run: run(False) for name, run in alive.items() if name != MATMUL}
    found, failed = interleave(forward, max(settings.rounds // 3, 3), settings)
    for name, seconds in found.items():
        _named(rows, name).forward = statistics.median(seconds)
    full = {name: lambda run=run: run(True) for name, run in alive.items() if name not in failed}
    host: dict[str, list[float]] = {}
    found, more = interleave(full, _rounds(full, settings), settings, host)
    for name, seconds in found.items():
        row = _named(rows, name)
        row.p20, row.p50, row.p80 = (quantile(seconds, q) for q in (0.2, 0.5, 0.8))
        if settings.device == "cuda":
            row.host = statistics.median(host[name])
            row.launches = launches(full[name])
    for name, status in {**failed, **more}.items():
        _named(rows, name).status = status
    ours, bare = rows[0].p50, rows[-1].p50
    for row in rows:
        if row.p50 is not None and ours is not None and bare is not None:
            row.ratio, row.matmul_share = row.p50 / ours, bare / row.p50
    return rows


def _rounds(runs: Mapping[str, Callable[[], Any]], settings: Settings) -> int:
    """Rounds for steps of this length, by fastclip's."""
    if OURS not in runs:
        return settings.rounds
    try:
        least = min(_timed(runs[OURS], settings.device, DELAY)[0] for _ in range(3))
    except Exception:
        # the rounds say so, too
        return settings.rounds
    return settings.rounds * (MORE_ROUNDS if least < SHORT_STEP else 1)


def candidates(operator: Operator) -> list[Baseline]:
    """All that is measured of an operator, fastclip first."""
    return [Baseline(OURS, lambda inputs: operator.ours), *operator.baselines]


def why_not(baseline: Baseline, n: int, settings: Settings) -> str | None:
    """The status of a baseline that is not even tried at this size."""
    compiles = "compiled" in baseline.name and not settings.compiled
    if compiles or (baseline.name != OURS and not settings.baselines):
        return "left out"
    if baseline.largest is not None and n > baseline.largest:
        return f"not tried beyond {baseline.largest}"
    return None


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    settings: Settings,
    host: dict[str, list[float]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time all runs in turn, `rounds` times after the warm-up, each round begun by another one.

    Args:
        runs: what to time, by name.
        rounds: calls of each that count; fewer of a GPU's long ones.
        settings: the device, the calls of each before, and whether a GPU's are delayed.
        host: receives the seconds in which the host made each call; on a GPU they run ahead of
            the device's.

    Returns:
        The seconds of each run that did not fail, and the status of each that did.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    hosts = {} if host is None else host
    failed: dict[str, str] = {}
    delays: dict[str, float] = {}
    wanted = dict.fromkeys(runs, rounds)
    for turn in range(settings.warmup + rounds):
        if turn == settings.warmup and settings.device == "cuda":
            # whatever compiled during the warm-up has let the clocks fall
            warm_clocks()
        alive = list(seconds)
        first = turn % max(len(alive), 1)
        for name in (*alive[first:], *alive[:first]):
            if len(seconds[name]) >= wanted[name]:
                continue
            counted = turn >= settings.warmup
            delay = delays.get(name, DELAY) if counted and settings.delayed else None
            try:
                elapsed, queued = _timed(runs[name], settings.device, delay)
            except Exception as error:
                # a baseline that fails is out; the others go on
                failed[name] = status_of(error)
                del seconds[name]
                continue
            if counted:
                seconds[name].append(elapsed)
                hosts.setdefault(name, []).append(queued)
            else:
                # without a delay: a call that waits for the device would count it as its own, and
                # each delay would be longer than the last
                delays[name] = min(2 * queued + 1e-4, MOST_DELAY)
                # by the last of these calls: the first one compiles
                long = settings.device == "cuda" and elapsed > LONG_CALL
                wanted[name] = min(rounds, FEW_ROUNDS) if long else rounds
    return seconds, failed


def warm_clocks(seconds: float = 0.5) -> None:
    """Keep the GPU at large products for a while, so that what follows is timed at full clocks."""
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        for _ in range(10):
            x @ x
        torch.cuda.synchronize()


def launches(run: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a call sends to the GPU; None where nobody can count."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.events() or []
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    except Exception:
        # no profiling library, or no permission: the times are worth having without
        return None


def quick_check(operator: Operator, settings: Settings, n: int = 512, width: int = 64) -> float:
    """Relative error of fastclip's dX, as it will be timed, against the dense float64 oracle."""
    inputs = leaves(operator, n, width, settings)
    got = gradient_of(operator.ours, inputs, settings)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    loss = operator.ours(*wide, backend="reference")
    (want,) = torch.autograd.grad(loss, wide[0])
    return relative(got, want)


def make_inputs(
    operator: Operator, n: int, width: int, scale: float, dtype: torch.dtype, device: str
) -> Inputs:
    """The operator's inputs on a device, features in `dtype`."""
    with torch.device(device):
        made = operator.make(n, width, scale)
    return [
        t.to(device, dtype if t.ndim == 2 and t.shape[1] == width else t.dtype)
        .detach()
        .requires_grad_()
        for t in made
    ]


def leaves(operator: Operator, n: int, width: int, settings: Settings) -> Inputs:
    """The operator's inputs as the settings have them."""
    return make_inputs(operator, n, width, settings.scale, settings.dtype, settings.device)


def _try_out(
    baseline: Baseline, row: Row, inputs: Inputs, exact: Tensor | None, settings: Settings
) -> Callable[[bool], None]:
    """Build a baseline and run it twice: peak memory, error and whether its bits repeat."""

    def nothing(backward: bool) -> None:
        raise AssertionError("a baseline that failed is not timed")

    try:
        loss_function = baseline.build(inputs)
        first = gradient_of(loss_function, inputs, settings)
        before = reset_peak(settings.device)
        second = gradient_of(loss_function, inputs, settings)
        row.peak_bytes = peak_since(settings.device, before)
    except Exception as error:
        # somebody else's code may fail in any way; that is its row, and no reason to stop
        row.status = status_of(error)
        return nothing
    if exact is not None:
        row.error = relative(first, _across(exact, inputs[0]) if baseline.normalizes else exact)
    row.repeatable = torch.equal(first, second)

    def run(backward: bool) -> None:
        for leaf in inputs:
            leaf.grad = None
        with torch.set_grad_enabled(backward), autocast(settings):
            loss = loss_function(*inputs)
        if backward:
            loss.backward()

    return run


def status_of(error: Exception) -> str:
    """What a row says of a baseline that did not run."""
    text = str(error).splitlines()[0][:80] if str(error) else ""
    if isinstance(error, ImportError):
        return f"missing: {text}"
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {text}"


def gradient_of(loss_function: LossFunction, inputs: Inputs, settings: Settings) -> Tensor:
    """dX, computed with all other gradients, as it is timed."""
    with autocast(settings):
        loss = loss_function(*inputs)
    return torch.autograd.grad(loss, inputs, allow_unused=True)[0]


def _exact_gradient(operator: Operator, inputs: Inputs) -> Tensor | None:
    """dX in float64, chunked, of the features as they are; None where it does not fit."""
    try:
        wide = [t.detach().double().requires_grad_() for t in inputs]
        return torch.autograd.grad(operator.ours(*wide, backend="torch"), wide[0])[0]
    except Exception as error:
        print(f"{operator.name}: no exact gradient: {status_of(error)}", flush=True)
        return None


def _bare(operator: Operator, inputs: Inputs, settings: Settings) -> Callable[[bool], None]:
    """The matmul time: just the products, in chunks like ours, accumulated in float32.

    They are of the losses' precision on a GPU, and of float32 on a CPU.
    """
    features = [t.detach() for t in inputs if t.ndim == 2 and t.shape == inputs[0].shape]
    symmetric = operator.products[2] == 0
    x = torch.cat(features) if symmetric else features[0]
    y = x if symmetric else features[1]
    # products of fp16 with float32 output are not torch's; those of bf16 cost the same
    if settings.autocast or x.dtype == torch.float16:
        x, y = x.bfloat16(), y.bfloat16()
    if not x.is_cuda:
        x, y = x.float(), y.float()
    size = chunk_rows(len(x), len(y), x.element_size(), 0, x.device.type)
    S = x.new_empty((size, len(y)))
    dx = torch.empty_like(x, dtype=torch.float32)
    dy = torch.zeros_like(y, dtype=torch.float32)
    logits, row_gradients, column_gradients = operator.products

    def run(backward: bool) -> None:
        for start, stop in chunks(0, len(x), size):
            part = S[: stop - start]
            for _ in range(logits):
                torch.mm(x[start:stop], y.T, out=part)
            for _ in range(row_gradients):
                product(part, y, out=dx[start:stop])
            for _ in range(column_gradients):
                add_product(dy, part.T, x[start:stop])

    return run


def autocast(settings: Settings) -> torch.autocast:
    """The context that losses are computed in."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.autocast)


def relative(got: Tensor, want: Tensor) -> float:
    """The difference's norm, relative to what is wanted."""
    return ((got.double() - want).norm() / want.norm()).item()


def _across(gradient: Tensor, features: Tensor) -> Tensor:
    x = features.detach().double()
    return gradient - x * (x * gradient).sum(dim=1, keepdim=True)


def _named(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.baseline == name)


# the fastest clock of today's GPUs: a sleep of so many cycles lasts at least a second
_CYCLES_PER_SECOND = 2.1e9


# seconds that the device sleeps before a call: of one whose host time is not known, and at most
DELAY, MOST_DELAY = 4e-3, 0.05


def _timed(run: Callable[[], Any], device: str, delay: float | None) -> tuple[float, float]:
    """Seconds of a call, and in which the host made it.

    With a delay a GPU sleeps so long before the call's work, and finds all of it waiting: events
    then enclose device time alone.
    """
    if device == "cuda" and delay is not None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_CYCLES_PER_SECOND * delay))
        begin.record()
        started = time.perf_counter()
        run()
        host = time.perf_counter() - started
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    host = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, host


def reset_peak(device: str) -> int | None:
    """Begin to look for a peak of memory; returns the bytes in use, None where nobody counts."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        # what was freed goes back to the system first, or the next peak would hide in it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def peak_since(device: str, before: int | None) -> int | None:
    """The greatest number of bytes since `reset_peak`, above those it returned."""
    if before is None:
        return None
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def quantile(values: Sequence[float], q: float) -> float:
    """A quantile at a whole tenth, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[round(q * 10) - 1]
