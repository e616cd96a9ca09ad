"""Ways in which fastclip computes one loss, beside the baselines, interleaved.

`python -m fastclip.bench.variants --output FILE` compares what is kept for the backward, and the
C++ library with torch's operations alone.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import OURS, Baseline, Operator, Settings, measure
from fastclip.bench.screen import Rows

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing kept": {"keep_bytes": 0},
    "256 MiB kept": {"keep_bytes": 256 << 20},
    "torch": {"backend": "torch"},
}


def with_variants(operator: Operator) -> Operator:
    """The operator with each of `VARIANTS` as a baseline, the first ones."""
    variants = [
        Baseline(f"{OURS}, {name}", _building(functools.partial(operator.ours, **options)))
        for name, options in VARIANTS.items()
    ]
    return replace(operator, baselines=(*variants, *operator.baselines))


def _building(loss: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    return lambda inputs: loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write a file."""
    parser = argparse.ArgumentParser(prog="variants", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--loss", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--n", type=int, default=8192, help="rows")
    parser.add_argument("--width", type=int, nargs="+", default=[512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--autocast", action="store_true", help="under bf16 autocast")
    parser.add_argument("--compiled", action="store_true", help="with compiled baselines")
    parser.add_argument("--quick", action="store_true", help="a small size")
    given = parser.parse_args(arguments)
    n, rounds = (512, 1) if given.quick else (given.n, given.rounds)
    settings = Settings(rounds=rounds, autocast=given.autocast, compiled=given.compiled)
    with Rows("losses", settings, settings.device, given.output) as rows:
        for width in given.width:
            for name in given.loss:
                rows.add(measure(with_variants(OPERATORS[name]), n, width, settings))


if __name__ == "__main__":
    main()
