"""`fastclip eval table` and `list`: results side by side; the benchmarks that are known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.evaluate.registry import BENCHMARKS, describe
from fastclip.evaluate.results import read_result
from fastclip.evaluate.table import markdown_table
from fastclip.screen import on_screen


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print results as a Markdown table: a row per model, a column per data set and metric.

    A table wider than 80 columns is split into several.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files of `fastclip eval` and CLIP_benchmark."""
    metrics: tuple[str, ...] = ()
    """Metrics to show, by name or its last word, e.g. acc1 rho; by default all."""

    def run(self) -> int:
        """Print the table."""
        table = markdown_table([read_result(path) for path in self.files], self.metrics)
        print(on_screen(table))
        return 0


@dataclass(frozen=True, kw_only=True)
class List:
    """List the benchmarks with their files, where to get them, and the scores of chance."""

    def run(self) -> int:
        """Print them."""
        print("\n\n".join(describe(benchmark) for benchmark in BENCHMARKS.values()))
        return 0
