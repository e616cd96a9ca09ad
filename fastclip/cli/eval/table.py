"""`fastclip eval table` and `list`: results side by side; the benchmarks that are known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.evaluate.registry import BENCHMARKS, describe
from fastclip.evaluate.results import read_result
from fastclip.evaluate.table import markdown_table


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print results as a Markdown table: a row a model, a column a data set and metric."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files as `fastclip eval` and CLIP_benchmark write them."""
    metrics: tuple[str, ...] = ()
    """The metrics to show, by name or its last word, e.g. acc1 rho; all by default."""

    def run(self) -> int:
        """Print the table."""
        print(markdown_table([read_result(path) for path in self.files], self.metrics))
        return 0


@dataclass(frozen=True, kw_only=True)
class List:
    """Print the benchmarks that are files on disk: what they need, where to get it, and chance."""

    def run(self) -> int:
        """Print them."""
        print("\n\n".join(describe(benchmark) for benchmark in BENCHMARKS.values()))
        return 0
