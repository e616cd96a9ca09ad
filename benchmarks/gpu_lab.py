"""One session on a GPU: correctness, precision, tilings, and all losses beside their rivals.

`benchmarks/gpu_lab.sh --output DIR` ends within nine minutes on a machine with one NVIDIA GPU and
nothing but Python, torch and its triton; rivals that are installed as well take part. DIR receives
`check-triton.json`, `check-torch.json`, `sweep.json`, `tilings.json` (the table as it then is) and
`losses.json`; the last lines are a short table.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fastclip.bench import check, tile_sweep
from fastclip.bench.losses import OPERATORS, run
from fastclip.bench.runner import Row, Settings, environment, write_json

BUDGET = 520.0
# seconds from the start at which each part ends
CHECK_UNTIL, SWEEP_UNTIL = 170.0, 290.0


def summary(rows: list[Row]) -> list[str]:
    """fastclip's share of the roof and the rivals' ratios, a line each loss and size."""
    lines = [f"{'loss':9} {'n':>6} {'D':>5} {'ms':>9} {'roof':>5} {'MiB':>7}  rivals: time / ours"]
    for ours in (row for row in rows if row.rival == "fastclip" and row.p50 is not None):
        beside = [
            r for r in rows if (r.operator, r.n, r.width) == (ours.operator, ours.n, ours.width)
        ]
        ratios = [f"{r.rival} {r.ratio:.2f}" for r in beside[1:-1] if r.ratio is not None]
        memory = [f"{r.rival} {r.status}" for r in beside[1:-1] if r.status == "out of memory"]
        assert ours.p50 is not None and ours.roof_share is not None
        peak = (ours.peak_bytes or 0) / 2**20
        lines.append(
            f"{ours.operator:9} {ours.n:6} {ours.width:5} {1e3 * ours.p50:9.2f} "
            f"{ours.roof_share:5.0%} {peak:7.0f}  {', '.join(ratios + memory)}"
        )
    return lines


def main() -> int:
    """Run the parts in turn; exit status 1 where an implementation is wrong."""
    parser = argparse.ArgumentParser(prog="gpu_lab", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--no-sweep", action="store_true", help="leave the tilings as they are")
    parser.add_argument("--quick", action="store_true", help="few cases and small sizes")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured", file=sys.stderr)
        return 1
    began = time.monotonic()
    print(json.dumps(environment("cuda")))

    print("\n== correctness")
    well = True
    for backend in ("triton", "torch"):
        few = options.quick or backend == "torch"
        deadline = began + (CHECK_UNTIL if backend == "torch" else CHECK_UNTIL - 20)
        found, right = check.report("cuda", backend, few, deadline)
        well = well and right
        path = options.output / f"check-{backend}.json"
        path.write_text(json.dumps([asdict(finding) for finding in found], indent=1) + "\n")

    if not options.no_sweep:
        print("\n== tilings")
        result = tile_sweep.sweep(SWEEP_UNTIL - (time.monotonic() - began))
        (options.output / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
        # the losses below are measured with what was found
        tile_sweep.write_table(result)
        table = tile_sweep.launch.TILINGS_FILE.read_text()
        (options.output / "tilings.json").write_text(table)

    print("\n== losses")
    settings = Settings(dtype=torch.bfloat16, autocast=True, rounds=10, device="cuda")
    rows: list[Row] = []
    # the sizes that matter most first: what the time does not allow is left out and said
    plan = [(65536, 768), (32768, 768), (16384, 768), (4096, 768)]
    plan += [(n, width) for width in (512, 1024) for n in (65536, 32768, 16384, 4096)]
    for n, width in [(4096, 512)] if options.quick else plan:
        left = BUDGET - (time.monotonic() - began)
        found_rows, wrong = run(list(OPERATORS), [n], [width], settings, max(left, 0.0))
        rows += found_rows
        well = well and not wrong
        write_json(options.output / "losses.json", rows, settings)
    print(f"\n== summary, after {time.monotonic() - began:.0f} s")
    print("\n".join(summary(rows)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
