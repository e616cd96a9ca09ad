"""Up to which size S is held whole: each loss by way of a whole S and of S in tiles, interleaved.

`python -m fastclip.bench.small --output FILE` measures and prints the table for `ops/dense.py`: by
loss the entries of the largest S for which the whole one is nowhere slower.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import (
    MORE_ROUNDS,
    SHORT_STEP,
    Operator,
    Row,
    Settings,
    gradient_of,
    interleave,
    launches,
    leaves,
    quantile,
)
from fastclip.bench.screen import Rows
from fastclip.ops import dense

SIZES = (16, 64, 256, 512, 1024, 2048, 3072, 4096)
WIDTH = {"cpu": 512, "cuda": 768}
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "fastclip whole": dense.switched_on,
    "fastclip tiled": dense.switched_off,
}
# medians of the same thing differ by so much
TOLERANCE = 1.05


def measure(operator: Operator, n: int, width: int, settings: Settings) -> list[Row]:
    """Both ways of one loss at one size, forward and backward."""
    inputs = leaves(operator, n, width, settings)

    def step(way: str) -> None:
        with WAYS[way]():
            gradient_of(operator.ours, inputs, settings)

    runs = {way: lambda way=way: step(way) for way in WAYS}
    found, failed = interleave(runs, 3, settings)
    if not failed:
        short = min(map(min, found.values())) < SHORT_STEP
        host: dict[str, list[float]] = {}
        rounds = settings.rounds * (MORE_ROUNDS if short else 1)
        found, failed = interleave(runs, rounds, settings, host)
    rows = []
    for way in WAYS:
        row = Row(operator.name, way, n, width, failed.get(way, "ok"))
        rows.append(row)
        if row.status == "ok" and not failed:
            row.p20, row.p50, row.p80 = (quantile(found[way], q) for q in (0.2, 0.5, 0.8))
            if settings.device == "cuda":
                row.host, row.launches = statistics.median(host[way]), launches(runs[way])
    if not failed:
        for row in rows:
            assert row.p50 is not None and rows[0].p50 is not None
            row.ratio = row.p50 / rows[0].p50
    return rows


def limits(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """By loss the entries of the largest S up to which the whole one is nowhere slower."""
    # on a GPU, a step can be no shorter than the host takes to begin it
    times = {
        (r["operator"], r["n"], r["baseline"]): r["p50"] and max(r["p50"], r.get("host") or 0.0)
        for r in rows
    }
    found: dict[str, int] = {}
    for name in dict.fromkeys(row["operator"] for row in rows):
        found[name] = 0
        for n in sorted({row["n"] for row in rows if row["operator"] == name}):
            whole, tiled = (times[name, n, way] for way in WAYS)
            if whole is None or tiled is None or whole > TOLERANCE * tiled:
                break
            found[name] = n * n
    return found


def run(
    sizes: Sequence[int], settings: Settings, add: Callable[[list[Row]], None]
) -> dict[str, int]:
    """Measure all losses, the small sizes first; `add` receives the rows of each.

    Prints the limits and returns them.
    """
    rows: list[Row] = []
    for n in sizes:
        for operator in OPERATORS.values():
            measured = measure(operator, n, WIDTH[settings.device], settings)
            rows += measured
            add(measured)
    found = limits([vars(row) for row in rows])
    for name, entries in found.items():
        print(f"({settings.device!r}, {name!r}): {round(entries**0.5)}**2")
    return found


def settings_for(device: str, rounds: int = 15) -> Settings:
    """What a device is measured with: bf16 under autocast on a GPU, float32 on a CPU."""
    if device == "cuda":
        return Settings(torch.bfloat16, autocast=True, rounds=rounds, device=device)
    return Settings(rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write a file."""
    parser = argparse.ArgumentParser(prog="small", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--device", choices=list(WIDTH), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="rows")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    settings = settings_for(options.device, options.rounds)
    with Rows("losses", settings, options.device, options.output) as rows:
        run(options.sizes, settings, rows.add)


if __name__ == "__main__":
    main()
