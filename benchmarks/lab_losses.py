"""The losses of a session on a GPU, where one baseline may spoil the device for all.

After an illegal memory access a process cannot use its GPU any more. So the sizes are measured in a
process of their own. Where it dies, its size is measured again without baselines, and a new
process continues with the next size.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastclip.atomic import write_text
from fastclip.bench.losses import OPERATORS, run
from fastclip.bench.records import KEYS
from fastclip.bench.runner import Row, Settings
from fastclip.bench.screen import Rows
from fastclip.bench.trials import gpu_clocks

# what matters most first: what the time does not allow is left out, and the output says so
PLAN = [(65536, 768), (32768, 768), (1024, 768), (256, 768), (4096, 768), (16384, 768)]
PLAN += [(n, width) for width in (512, 1024) for n in (65536, 32768, 1024, 4096)]
QUICK = [(4096, 512)]
# open_clip under torch.compile takes up to half a minute a loss and size: one size is enough
COMPILED_AT = (32768, 768)

FILE, BEGUN = "losses.json", "losses-begun.txt"
SPOILED = 3
"""Exit status of a process that cannot use its GPU any more."""

Command = Callable[[int, float, bool], Sequence[str]]


def measure(output: Path, seconds: float, quick: bool, command: Command | None = None) -> bool:
    """Measure all sizes within so many seconds; their rows are in losses.json.

    Args:
        output: folder of the results.
        seconds: for all of them.
        quick: one small size alone.
        command: of a process: its first size, its seconds, and whether it measures that size alone
            and without baselines.

    Returns:
        Whether fastclip was right everywhere.
    """
    stop, well = time.monotonic() + seconds, True
    command = command or (lambda *how: part_command(output, quick, *how))
    first, alone, count = 0, False, len(QUICK if quick else PLAN)
    while first < count and (left := stop - time.monotonic()) > 1:
        (output / BEGUN).write_text(str(first))
        try:
            status = subprocess.run(command(first, left, alone), timeout=left).returncode
        except subprocess.TimeoutExpired:
            break
        ended = status in (0, 1)
        well = well and (status == 0 or not (ended or alone))
        if ended or alone:
            first, alone = first + 1 if alone else count, False
            continue
        first, alone = int((output / BEGUN).read_text()), True
        print(f"size {first}: the process ended with status {status}", flush=True)
    merge(output)
    return well


def part_command(output: Path, quick: bool, first: int, seconds: float, alone: bool) -> list[str]:
    """The process that measures from a size on."""
    command = [sys.executable, "-m", "fastclip.bench.lab_losses", "--output", str(output)]
    command += ["--first", str(first), "--seconds", f"{seconds:.0f}"]
    return command + ["--quick"] * quick + ["--alone"] * alone


def measure_from(output: Path, first: int, seconds: float, quick: bool, alone: bool) -> int:
    """Measure sizes in this process; the exit status: 0, 1 where fastclip is wrong, or SPOILED."""
    stop, well = time.monotonic() + seconds, True
    settings = Settings(
        dtype=torch.bfloat16, autocast=True, rounds=10, device="cuda", baselines=not alone
    )
    clocks: list[str | None] = []
    sizes = QUICK if quick else PLAN
    file = output / FILE
    if first or alone:
        file = output / f"losses-{first:02d}{'-alone' if alone else ''}.json"
    with Rows("losses", settings, "cuda", file, clocks=clocks) as rows:

        def add(found: list[Row]) -> None:
            torch.cuda.synchronize()
            clocks.append(gpu_clocks())
            rows.add(found)

        for number in range(first, first + 1 if alone else len(sizes)):
            (output / BEGUN).write_text(str(number))
            n, width = sizes[number]
            left = max(stop - time.monotonic(), 0.0)
            here = replace(settings, compiled=(n, width) == COMPILED_AT)
            try:
                _, wrong = run(list(OPERATORS), [n], [width], here, add, left)
                torch.cuda.synchronize()
            except torch.AcceleratorError as error:
                print(f"n = {n:,} D = {width:,}: {error}", flush=True)
                return SPOILED
            well = well and not wrong
    return 0 if well else 1


def merge(output: Path) -> list[dict[str, Any]]:
    """Put the rows of all processes into losses.json, and return them; the first of equal ones."""
    files = sorted(output.glob("losses-*.json"), key=lambda file: file.stat().st_mtime)
    if (output / FILE).exists():
        files.insert(0, output / FILE)
    contents = [json.loads(file.read_text()) for file in files]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for content in contents:
        for row in content["results"]:
            rows.setdefault(tuple(row[key] for key in KEYS["losses"]), row)
    if contents:
        whole = {**contents[0], "results": list(rows.values())}
        whole["clocks"] = [clock for content in contents for clock in content["clocks"]]
        write_text(output / FILE, json.dumps(whole, indent=1) + "\n")
    for file in files[1:] if (output / FILE) in files else files:
        file.unlink()
    return list(rows.values())


def main() -> int:
    """Measure from a size on, in this process."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.lab_losses", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--first", type=int, default=0, help="number of the first size")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--alone", action="store_true", help="one size, without baselines")
    given = parser.parse_args()
    return measure_from(given.output, given.first, given.seconds, given.quick, given.alone)


if __name__ == "__main__":
    sys.exit(main())
