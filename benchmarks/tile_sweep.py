"""Time the kernels that form S under other tilings, and write the table that the launchers read.

`python -m fastclip.bench.tile_sweep [--write] [--seconds S]`, on a GPU. For each kernel and
precision the candidates are timed one after the other on one chunk at N = 32k, D = 768, within
an equal share of the time; the fastest becomes the architecture's entry. One that spills registers
may still be the fastest, and one that does not fit is passed over.
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

from fastclip.atomic import write_text
from fastclip.bench.runner import Settings, interleave
from fastclip.kernels import launch
from fastclip.kernels.launch import Tiling
from fastclip.ops.tiles import Lines, Running, Tile
from fastclip.ops.triton_tiles import TritonTiles

CANDIDATES = {
    "16bit": [
        *(
            Tiling(128, 256, 64, 8, stages, group, tma=True, parts=parts)
            for stages in (3, 4)
            for group in (8, 16)
            for parts in (2, 4)
        ),
        *(Tiling(256, 128, 64, 8, 3, group, tma=True, parts=4) for group in (4, 8)),
        # two programs a multiprocessor: one's exponentials beside the other's products
        Tiling(128, 128, 64, 8, 3, tma=True, parts=4, registers=128),
        Tiling(128, 128, 64, 4, 3, tma=True, parts=4),
        Tiling(128, 128, 64, 8, 4, tma=True, parts=2),
        Tiling(128, 256, 64, 8, 3, parts=2),
        Tiling(128, 128, 64, 8, 3),
    ],
    "tf32": [
        Tiling(rows, columns, 32, warps, 3)
        for rows, columns, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4))
    ],
}
KERNELS = ("statistics", "gradient", "sigmoid")


# compilations take seconds each, and a machine with a GPU has cores
COMPILERS = 14


def problem(precision: str, n: int = 32768, chunk: int = 4096, width: int = 768) -> dict[str, Any]:
    """One chunk of rows against all columns, with what each kernel asks for."""
    dtype = torch.bfloat16 if precision == "16bit" else torch.float32
    y = torch.nn.functional.normalize(torch.randn(n, width, device="cuda"), dim=1).to(dtype)
    scale = torch.tensor(14.3, device="cuda")
    tile = Tile(y[:chunk], y, scale, None, 0)
    lse = torch.full((n,), 12.0, device="cuda")
    ones = torch.ones(n, device="cuda")
    return {"tile": tile, "lse": lse, "ones": ones, "dtype": dtype}


def runs(precision: str, **sizes: int) -> dict[str, Callable[[], Any]]:
    """A call of each kernel through the implementation that users run."""
    given = problem(precision, **sizes)
    tile, lse, ones = given["tile"], given["lse"], given["ones"]
    tiles = TritonTiles(given["dtype"])
    rows = len(tile.x_CD)
    out = tiles.gradient_buffer(rows, tile.y_SD)
    lines, columns = Lines(lse[:rows], ones[:rows]), Lines(lse, ones)

    def statistics() -> None:
        running = [Running.of(len(t), ones, torch.float32) for t in (tile.x_CD, tile.y_SD)]
        tiles.statistics(tile, *running)

    return {
        "statistics": statistics,
        "gradient": lambda: tiles.gradient(tile, lines, columns, out, True),
        "sigmoid": lambda: tiles.sigmoid(tile, ones[:rows], out),
    }


def compile_part(part: int, parts: int) -> None:
    """Compile every `parts`-th candidate into Triton's cache on disk, by running it once."""
    architecture = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    for precision, candidates in CANDIDATES.items():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        calls = runs(precision, n=512, chunk=512)
        jobs = [(kernel, candidate) for candidate in candidates for kernel in KERNELS]
        for kernel, candidate in jobs[part::parts]:
            launch.tilings()[architecture][kernel][precision] = candidate
            # what does not compile is reported where it is timed
            with contextlib.suppress(Exception):
                calls[kernel]()


def compile_all() -> None:
    """All candidates, in processes of their own."""
    command = [sys.executable, "-m", "fastclip.bench.tile_sweep", "--compile"]
    parts = [f"{part}/{COMPILERS}" for part in range(COMPILERS)]
    processes = [subprocess.Popen([*command, part]) for part in parts]
    for process in processes:
        process.wait()


def sweep(seconds: float) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Every candidate's time for each kernel and precision, fastest first."""
    architecture = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    result: dict[str, dict[str, list[dict[str, Any]]]] = {}
    began = time.monotonic()
    compile_all()
    seconds -= time.monotonic() - began
    print(f"  compiled in {time.monotonic() - began:.0f} s", flush=True)
    share = seconds / (len(CANDIDATES) * len(KERNELS))
    for precision, candidates in CANDIDATES.items():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        calls = runs(precision)
        for kernel in KERNELS:
            table = launch.tilings()[architecture][kernel]
            shipped, timed, began = table[precision], [], time.monotonic()
            for candidate in [shipped, *(c for c in candidates if c != shipped)]:
                if time.monotonic() - began > share:
                    break
                table[precision] = candidate
                try:
                    calls[kernel]()
                    torch.cuda.synchronize()
                except Exception as error:
                    # too much shared memory, say: no candidate here
                    print(f"  {kernel} {precision} {candidate}: {type(error).__name__}")
                    continue
                settings = Settings(device="cuda", warmup=2)
                (found,) = interleave({"": calls[kernel]}, 10, settings)[0].values()
                timed.append({"tiling": _numbers(candidate), "seconds": sorted(found)[5]})
            table[precision] = shipped
            result.setdefault(kernel, {})[precision] = sorted(timed, key=lambda t: t["seconds"])
            for entry in result[kernel][precision]:
                milliseconds = 1e3 * entry["seconds"]
                print(f"  {kernel:10} {precision:6} {milliseconds:8.3f} ms {entry['tiling']}")
    torch.set_float32_matmul_precision("highest")
    return result


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
            if timed:
                content["tilings"][architecture][kernel][precision] = timed[0]["tiling"]
    write_text(launch.TILINGS_FILE, format_table(content))
    launch.tilings.cache_clear()
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
    return numbers[:-1] if numbers[-1] is None else numbers


def main() -> int:
    """Sweep on the current GPU."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.tile_sweep", description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite kernels/tilings.json")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--compile", metavar="I/K", help="only compile every K-th candidate")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: tilings are measured on a GPU", file=sys.stderr)
        return 1
    if options.compile:
        compile_part(*map(int, options.compile.split("/")))
        return 0
    result = sweep(options.seconds)
    if options.write:
        write_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
