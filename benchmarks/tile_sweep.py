"""Time the kernels that form S under other tilings, and write the table that the launchers read.

`python -m fastclip.bench.tile_sweep [--write] [--seconds S]`, on a GPU. For each kernel and
precision the candidates are timed in turn on one chunk at N = 32k, D = 768, within an equal share
of the time; the fastest becomes the architecture's entry. One that spills registers may still be
the fastest.

Each candidate is first tried in a process of its own, which compiles it and compares what it
computes with float64. One that crashes, hangs, does not compile or is wrong costs no other: it is a
row that says so and is never timed.
"""

import argparse
import contextlib
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.atomic import write_text
from fastclip.bench.runner import Settings, interleave, relative, status_of
from fastclip.bench.trials import run_trials
from fastclip.kernels import launch
from fastclip.kernels.launch import Tiling
from fastclip.messages import logger
from fastclip.ops.tiles.base import LogSumExps, SoftmaxStats, Tile, Tiles
from fastclip.ops.tiles.torch import TorchTiles
from fastclip.ops.tiles.triton import TritonTiles

CANDIDATES = {
    "16bit": [
        *(Tiling(128, 256, 64, 8, 3, tma=True, parts=parts) for parts in (1, 2, 4)),
        Tiling(128, 256, 64, 8, 4, tma=True, parts=2),
        # half of the exchange between warps for the columns' sums, or none of it by shuffles
        Tiling(256, 128, 64, 8, 3, tma=True, parts=2),
        Tiling(128, 256, 64, 8, 3, parts=2, transpose=True),
        # one program a multiprocessor, which loads the next tile before a tile's epilogue
        *(Tiling(128, 256, 64, 8, 3, parts=parts, walkers=1) for parts in (2, 4)),
        # two programs a multiprocessor: one's exponentials beside the other's products
        Tiling(128, 128, 64, 4, 3, tma=True, parts=2),
    ],
    "tf32": [
        Tiling(rows, columns, 32, warps, 3)
        for rows, columns, warps in ((128, 128, 8), (128, 64, 4))
    ],
}
KERNELS = ("statistics", "gradient", "sigmoid")


ROUNDS = 10
# columns, rows and width of the trials: sides that no tile divides, and what is timed
SIZES = {"cpu": [(600, 330, 192)], "cuda": [(600, 330, 192), (32768, 4096, 768)]}
# log-sum-exps in the gradient's trial
LSE = 12.0
# float32 sums of rounded products; G and its log-sum-exps in 16 bits; tf32's 10 bits at scale 14
GREATEST_ERROR = {"16bit": 2e-2, "tf32": 2e-2}


class Trial(NamedTuple):
    """Whether a kernel runs and is right with a candidate: "ok", or what became of it."""

    precision: str
    kernel: str
    tiling: Tiling
    status: str


def problem(
    precision: str, n: int = 32768, chunk: int = 4096, width: int = 768, device: str = "cuda"
) -> tuple[Tile, Tensor]:
    """One chunk of rows against all columns, and a weight for each column."""
    dtype = torch.bfloat16 if precision == "16bit" else torch.float32
    y = torch.nn.functional.normalize(torch.randn(n, width, device=device), dim=1).to(dtype)
    scale = torch.tensor(14.3, device=device)
    return Tile(y[:chunk], y, scale, None, 0), torch.ones(n, device=device)


def runs(precision: str, device: str) -> dict[str, Callable[[], Any]]:
    """A call of each kernel through the implementation that users run."""
    sizes = {} if device == "cuda" else {"n": 96, "chunk": 64, "width": 32}
    tile, weight = problem(precision, device=device, **sizes)
    tiles = plain_tiles(tile)
    return {kernel: functools.partial(results, kernel, tiles, tile, weight) for kernel in KERNELS}


def plain_tiles(tile: Tile) -> TritonTiles:
    """For the kernels' plain variants, whose entries the candidates replace."""
    return TritonTiles(tile.x_CD.dtype, maxima=False)


def try_candidate(precision: str, candidate: Tiling, device: str = "cuda") -> Iterator[Trial]:
    """Run each kernel once with a candidate and compare it with float64; a trial a kernel."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    limit = GREATEST_ERROR[precision]
    for kernel in KERNELS:
        try:
            with shipped_as(kernel, precision, candidate, device):
                error = max(error_of(kernel, precision, device, *size) for size in SIZES[device])
            status = "ok" if error < limit else f"wrong: relative error {error:.1e}"
        except Exception as problem:
            # too much shared memory, say: no candidate for this kernel
            status = status_of(problem)
        yield Trial(precision, kernel, candidate, status)


def error_of(kernel: str, precision: str, device: str, n: int, chunk: int, width: int) -> float:
    """Relative error of a kernel's results, as its tiling is now, against float64."""
    tile, weight = problem(precision, n, chunk, width, device)
    found = results(kernel, plain_tiles(tile), tile, weight)
    wide = tile._replace(
        x_CD=tile.x_CD.double(), y_SD=tile.y_SD.double(), scale=tile.scale.double()
    )
    exact = results(kernel, TorchTiles(torch.float64), wide, weight.double())
    # max of a NaN depends on the order: a sum does not
    return sum(relative(got, want) for got, want in zip(found, exact, strict=True))


def results(kernel: str, tiles: Tiles, tile: Tile, weight: Tensor) -> list[Tensor]:
    """What a kernel computes of one tile: log-sum-exps, or the entries of G."""
    rows, columns = len(tile.x_CD), len(tile.y_SD)
    if kernel == "statistics":
        running = [SoftmaxStats.empty(n, weight, weight.dtype) for n in (rows, columns)]
        tiles.statistics(tile, *running)
        return [lines.lse() for lines in running]
    out = tiles.gradient_buffer(rows, tile.y_SD)
    if kernel == "gradient":
        lse = torch.full_like(weight, LSE)
        tiles.gradient(
            tile, LogSumExps(lse[:rows], weight[:rows]), LogSumExps(lse, weight), out, True
        )
    else:
        tiles.sigmoid(tile, weight[:rows], out)
    return [out[:, :columns]]


@contextlib.contextmanager
def shipped_as(kernel: str, precision: str, candidate: Tiling, device: str) -> Iterator[None]:
    """A candidate replaces the table's entry inside the context."""
    if device == "cpu":
        # the interpreter has tilings of its own
        before = launch.INTERPRETER_TILINGS
        launch.INTERPRETER_TILINGS = (candidate, candidate)
        try:
            yield
        finally:
            launch.INTERPRETER_TILINGS = before
        return
    architecture = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    table = launch.tilings()[architecture][kernel]
    entry = table[precision]
    table[precision] = candidate
    launch.tiling_of.cache_clear()
    try:
        yield
    finally:
        table[precision] = entry
        launch.tiling_of.cache_clear()


def try_command(precision: str, candidate: Tiling) -> list[str]:
    """The process that tries one candidate."""
    numbers = json.dumps(_numbers(candidate))
    return [sys.executable, "-m", "fastclip.bench.tile_sweep", "--try", precision, numbers]


def try_all(
    jobs: Sequence[tuple[str, Tiling]],
    seconds: float,
    command: Callable[[str, Tiling], Sequence[str]] = try_command,
) -> list[Trial]:
    """Try candidates in processes of their own, within so many seconds.

    Args:
        jobs: precisions and tilings.
        seconds: for all of them.
        command: of one candidate's process, which prints a kernel's name and status a line.

    Returns:
        A trial for each candidate and kernel; of a process that died or was stopped its end is
        the status of those that it did not come to.
    """
    found = run_trials([command(*job) for job in jobs], seconds)
    return [
        Trial(precision, kernel, candidate, said.get(kernel, ended))
        for (precision, candidate), (said, ended) in zip(jobs, found, strict=True)
        for kernel in KERNELS
    ]


def sweep(
    seconds: float, device: str = "cuda", save: Callable[[Any], None] | None = None
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Every candidate's time for each kernel and precision, fastest first.

    `save` receives what is found so far after each kernel. A candidate that was not timed has a
    status and no seconds.
    """
    result: dict[str, dict[str, list[dict[str, Any]]]] = {}
    began = time.monotonic()
    jobs = [(p, c) for p in CANDIDATES for c in candidates_with_shipped(p, device)]
    trials = try_all(jobs, 0.6 * seconds)
    print(f"  tried in {time.monotonic() - began:.0f} s", flush=True)
    stop = began + seconds
    for precision in CANDIDATES:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        calls = runs(precision, device)
        for kernel in KERNELS:
            tried = [t for t in trials if (t.precision, t.kernel) == (precision, kernel)]
            rows = timed(kernel, precision, tried, calls[kernel], device, stop)
            result.setdefault(kernel, {})[precision] = rows
            for row in rows:
                said = f"{1e3 * row['seconds']:.3f} ms" if "seconds" in row else row["status"]
                print(f"  {kernel:10} {precision:6} {said} {row['tiling']}", flush=True)
            if save is not None:
                save(result)
    torch.set_float32_matmul_precision("highest")
    return result


def candidates_with_shipped(precision: str, device: str) -> list[Tiling]:
    """The table's entries first, so that a sweep cut short has them to compare with."""
    name = launch.architecture(torch.device(device, 0)) if device == "cuda" else "sm_90"
    shipped = [launch.tilings()[name][kernel][precision] for kernel in KERNELS]
    return list(dict.fromkeys([*shipped, *CANDIDATES[precision]]))


def timed(
    kernel: str,
    precision: str,
    tried: Sequence[Trial],
    call: Callable[[], Any],
    device: str,
    stop: float,
) -> list[dict[str, Any]]:
    """Time the candidates that were right, in turn; the fastest first, the others last."""

    def run(candidate: Tiling) -> None:
        with shipped_as(kernel, precision, candidate, device):
            call()

    right = {str(t.tiling): t.tiling for t in tried if t.status == "ok"}
    others = [{"tiling": _numbers(t.tiling), "status": t.status} for t in tried if t.status != "ok"]
    if time.monotonic() > stop:
        late = [{"tiling": _numbers(c), "status": "out of time"} for c in right.values()]
        return [*late, *others]
    runs = {name: lambda c=c: run(c) for name, c in right.items()}
    found, failed = interleave(runs, ROUNDS, Settings(device=device, warmup=2))
    rows: list[dict[str, Any]] = [
        {"tiling": _numbers(right[name]), "status": "ok", "seconds": statistics.median(seconds)}
        for name, seconds in found.items()
    ]
    others += [{"tiling": _numbers(right[n]), "status": status} for n, status in failed.items()]
    return [*sorted(rows, key=lambda row: row["seconds"]), *others]


def write_table(result: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Make the fastest the entries of this architecture in `kernels/tilings.json`."""
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = launch.true_architecture(device)
    content = json.loads(launch.TILINGS_FILE.read_text())
    # a device that another row has served gets a row of its own
    fallback = copy.deepcopy(content["tilings"][launch.architecture(device)])
    content["tilings"].setdefault(architecture, fallback)
    for kernel, precisions in result.items():
        for precision, timed in precisions.items():
            if timed and "seconds" in timed[0]:
                content["tilings"][architecture][kernel][precision] = timed[0]["tiling"]
    write_text(launch.TILINGS_FILE, format_table(content))
    launch.tilings.cache_clear()
    launch.tiling_of.cache_clear()
    launch.architecture.cache_clear()


def format_table(content: dict[str, Any]) -> str:
    """The table as JSON, one line a kernel."""
    lines = ["{", f' "about": {json.dumps(content["about"])},', ' "tilings": {']
    for name, kernels in content["tilings"].items():
        lines.append(f'  "{name}": {{')
        lines += [f'   "{kernel}": {json.dumps(entries)},' for kernel, entries in kernels.items()]
        lines[-1] = lines[-1].rstrip(",")
        lines.append("  },")
    lines[-1] = "  }"
    return "\n".join([*lines, " }", "}"]) + "\n"


def _numbers(tiling: Tiling) -> list[int | None]:
    numbers = [int(value) if value is not None else None for value in astuple(tiling)]
    # what is left at its default at the end is not written
    while numbers[-1] in (None, 0):
        numbers.pop()
    return numbers


def main() -> int:
    """Sweep on the current GPU."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.tile_sweep", description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite kernels/tilings.json")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument(
        "--try", dest="trial", nargs=2, metavar=("PRECISION", "TILING"), help="check one candidate"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        logger.error("no CUDA device: tilings are measured on a GPU")
        return 1
    if options.trial:
        precision, numbers = options.trial
        for trial in try_candidate(precision, Tiling(*json.loads(numbers))):
            print(json.dumps([trial.kernel, trial.status]), flush=True)
        return 0
    result = sweep(options.seconds)
    if options.write:
        write_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
