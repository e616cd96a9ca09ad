"""One session on a GPU: ceilings, tilings, correctness, and all losses beside their rivals.

`benchmarks/gpu_lab.sh --output DIR` ends within nine minutes on a machine with one NVIDIA GPU and
nothing but Python, torch and its triton; rivals that are installed as well take part. DIR receives
`ceilings.json`, `sweep.json`, `tilings.json` (the table as it then is), `check-triton.json`,
`check-torch.json` and `losses.json`; the last lines are a short table. `--attention`, in a call of
its own, measures that operator in the same way: `attention_plans.json`, `attention.json`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastclip.bench import attention, attention_check, attention_sweep, records, tile_sweep
from fastclip.bench.ceilings import ceilings
from fastclip.bench.losses import OPERATORS, run
from fastclip.bench.runner import Row, Settings

# processes that compile, and seconds of each stage; the losses end with the budget
CHECKERS = 12
BUDGET, CHECK_SECONDS, SWEEP_SECONDS = 520.0, 100.0, 120.0


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


def check_all(output: Path, seconds: float, quick: bool) -> bool:
    """Check both implementations in parallel processes; their findings go to JSON files."""
    command = [sys.executable, "-m", "fastclip.bench.check", "--device", "cuda"]
    command += ["--seconds", str(seconds)]
    parts = [("triton", f"{part}/{CHECKERS}", quick) for part in range(CHECKERS)]
    processes = {}
    for backend, part, few in [*parts, ("torch", "0/1", True)]:
        file = output / f"check-{backend}-{part.partition('/')[0]}.json"
        flags = ["--backend", backend, "--part", part, "--output", str(file)]
        processes[file] = subprocess.Popen(
            [*command, *flags, *(["--few"] if few else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    well = True
    findings: dict[str, list[Any]] = {"triton": [], "torch": []}
    for file, process in processes.items():
        text, _ = process.communicate()
        well = well and process.returncode == 0
        if process.returncode != 0 or file.name.endswith("-0.json"):
            print(text, flush=True)
        if file.exists():
            findings[file.name.split("-")[1]] += json.loads(file.read_text())
            file.unlink()
    for backend, found in findings.items():
        wrong = sum(not finding["ok"] for finding in found)
        print(f"{backend}: {len(found)} cases against float64, {wrong} wrong")
        (output / f"check-{backend}.json").write_text(json.dumps(found) + "\n")
    return well


def measure_attention(output: Path, quick: bool) -> bool:
    """Find plans, check with them, and measure attention beside its rivals; whether it is right."""
    settings = Settings(torch.bfloat16, rounds=15, warmup=3, device="cuda")
    tokens = 1 << (14 if quick else 18)
    if not quick:
        print("\n== plans", flush=True)
        attention_sweep.sweep(SWEEP_SECONDS, output, tokens)
    print("\n== correctness", flush=True)
    well = attention_check.check("cuda", 20.0 if quick else CHECK_SECONDS, output)
    print("\n== attention", flush=True)
    rows = attention.rivals(settings, output / "attention.json", tokens, flex=not quick)
    print("\n".join(["", *map(attention.line_of, rows)]))
    return well


def main() -> int:
    """Run the parts in turn; exit status 1 where an implementation is wrong."""
    parser = argparse.ArgumentParser(prog="gpu_lab", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--no-sweep", action="store_true", help="leave the tilings as they are")
    parser.add_argument(
        "--attention",
        action="store_true",
        help="attention in the losses' place: check, plans, rivals",
    )
    parser.add_argument("--quick", action="store_true", help="few cases and small sizes")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured", file=sys.stderr)
        return 1
    began = time.monotonic()
    print(json.dumps(records.environment("cuda")))

    if options.attention:
        return 0 if measure_attention(options.output, options.quick) else 1

    print("\n== ceilings", flush=True)
    if not options.quick:
        (options.output / "ceilings.json").write_text(json.dumps(ceilings(), indent=1) + "\n")

    if not options.no_sweep:
        print("\n== tilings", flush=True)
        result = tile_sweep.sweep(SWEEP_SECONDS)
        (options.output / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
        # what was found is what is checked and measured below
        tile_sweep.write_table(result)
        table = tile_sweep.launch.TILINGS_FILE.read_text()
        (options.output / "tilings.json").write_text(table)

    print("\n== correctness", flush=True)
    well = check_all(options.output, CHECK_SECONDS, options.quick)

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
        records.write(options.output / "losses.json", "losses", settings, rows, "cuda")
    print(f"\n== summary, after {time.monotonic() - began:.0f} s")
    print("\n".join(summary(rows)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
