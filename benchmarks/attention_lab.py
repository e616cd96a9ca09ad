"""Attention on a GPU: right, tuned, beside its baselines.

`python -m fastclip.bench.attention_lab --check --sweep --baselines [--seconds N] [--output DIR]`
runs what it is asked for, in this order: the operator against float64, the plans of every length
against each other (with the best to be put in kernels/attention_plans.json), and the operator
beside its baselines.
"""

import argparse
from pathlib import Path

import torch

from fastclip.bench.attention import baselines
from fastclip.bench.attention_check import check
from fastclip.bench.attention_parts import SHAPES
from fastclip.bench.attention_sweep import sweep
from fastclip.bench.runner import Settings
from fastclip.bench.screen import Rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("check", "sweep", "baselines"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seconds", type=float, default=120, help="for each of check and sweep")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--lengths", type=int, nargs="*", help="only these lengths")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    shapes = [shape for shape in SHAPES if not given.lengths or shape[0] in given.lengths]
    right = True
    if given.check:
        right = check(given.device, given.seconds, given.output)
    if given.sweep:
        sweep(given.seconds, given.output, given.tokens, shapes)
    if given.baselines or not (given.check or given.sweep):
        settings = Settings(torch.bfloat16, rounds=given.rounds, warmup=3, device=given.device)
        file = given.output / "attention.json" if given.output else None
        more = {"tokens": given.tokens}
        with Rows("attention", settings, given.device, file, **more) as rows:
            baselines(settings, rows.add, given.tokens, shapes, given.flex)
    if not right:
        raise SystemExit("the check failed")


if __name__ == "__main__":
    main()
