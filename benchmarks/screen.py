"""The rows of one run of a benchmark: printed and written as they are measured, closed with what
did not run.

The screen has at most 80 columns. Rows that stand side by side have a line above them that names
their place; what is the same reason for many of them is said once, at the end.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from fastclip.bench import records
from fastclip.bench.kinds import KINDS, UNRELIABLE, Column, Group, Kind
from fastclip.messages import counted, logger

WIDTH = 80


class Rows:
    """A run's rows.

    Used in a `with` statement: it checks that the file can be written, and at its end, Ctrl-C
    included, says what did not run and where the rows are.

    Args:
        benchmark: a key of `KINDS`.
        settings: how it is measured, a dataclass.
        device: cpu or cuda.
        path: JSON file, written anew with all rows whenever some are added; None writes nothing.
        more: further entries of the file.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(
        self, benchmark: str, settings: Any, device: str, path: Path | None, **more: Any
    ) -> None:
        records.prepare(path)
        self.kind, self.benchmark = KINDS[benchmark], benchmark
        self.settings, self.device, self.path, self.more = settings, device, path, more
        self.load = load_average()
        self.rows: list[Any] = []
        self._groups: list[Group] = []

    def __enter__(self) -> "Rows":
        warning = busy(self.load)
        if warning:
            logger.warning(textwrap.fill(f"warning: {warning}", WIDTH))
        print("\n".join(heads(self.kind)), flush=True)
        return self

    def add(self, rows: Sequence[Any]) -> None:
        """Take what was measured since the last time: rows of the benchmark, dataclasses."""
        self.rows += rows
        if self.path is not None and self.rows:
            records.write(
                self.path,
                self.benchmark,
                self.settings,
                self.rows,
                self.device,
                load_average=self.load,
                **self.more,
            )
        groups = grouped(self.benchmark, self.settings, rows)
        self._groups += groups
        for group in groups:
            print("\n".join(lines(group)), flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        print("\n".join(closing(self._groups)), end="\n" if self._groups else "", flush=True)
        if self.path is None or not self.rows:
            return
        if kind is not None:
            measured = [row for row in self.rows if row.status == "ok"]
            rows = counted(len(measured), "row")
            logger.error(f"cut short; {self.path} has the {rows} that were measured")


def grouped(benchmark: str, settings: Any, rows: Sequence[Any]) -> list[Group]:
    """Rows, dataclasses, side by side."""
    how = settings if isinstance(settings, Mapping) else asdict(settings)
    record = records.Record("", benchmark, {}, dict(how), [asdict(row) for row in rows])
    return list(KINDS[benchmark].groups(record))


def heads(kind: Kind) -> list[str]:
    """Two lines above all rows: names, and their units."""
    names = [head.partition(", ")[::2] for head, _ in kind.screen]
    found = []
    for part in (0, 1):
        cells = [
            f"{name[part]:>{_wide(column)}}"
            for name, column in zip(names, kind.screen, strict=True)
        ]
        found.append(" ".join([" " * _name_width(kind), *cells]))
    return found


def lines(group: Group) -> list[str]:
    """The place, and a line for each row that ran; fastclip's also where it did not."""
    kind = group.kind
    found = [group.place]
    for row in group.rows:
        name, width = row[kind.name], _name_width(kind)
        # the longest has no room for a comma
        start = f"  {name.replace(', compiled', ' compiled')}".ljust(width)
        if row["status"] == "ok" and not _measured(row, kind):
            continue
        if row["status"] == "ok":
            cells = [f"{cell(row):>{_wide((head, cell))}}" for head, cell in kind.screen]
            found.append(" ".join([start, *cells]).rstrip())
        elif name.startswith("fastclip"):
            text = f"{start} {row['status']}"
            found.append(text if len(text) <= WIDTH else f"{text[: WIDTH - 4]} ...")
    return found


def closing(groups: Sequence[Group]) -> list[str]:
    """What is to be said of all rows: what did not run and why, whose bits vary, what to doubt."""
    said = []
    reasons: dict[str, dict[str, list[str]]] = {}
    ran = {row[g.kind.name] for g in groups for row in g.baselines}
    vary: dict[str, None] = {}
    for group in groups:
        for row in group.left_out:
            names = reasons.setdefault(row["status"], {})
            names.setdefault(row[group.kind.name], []).append(group.place)
        ran_here = [row for row in group.rows if row["status"] == "ok"]
        vary |= {row[group.kind.name]: None for row in ran_here if row.get("repeatable") is False}
    if reasons:
        parts = []
        for reason, names in reasons.items():
            those = [
                f"{name} at {'; '.join(places)}" if name in ran else name
                for name, places in names.items()
            ]
            parts.append(f"{', '.join(those)} ({reason})")
        said.append(f"Did not run: {'; '.join(parts)}.")
    if vary:
        said.append(f"The bits of the gradient vary from call to call: {', '.join(vary)}.")
    if any(group.doubtful for group in groups):
        said.append(UNRELIABLE)
    return [textwrap.fill(text, WIDTH) for text in said]


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, on average; None where nobody counts."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def busy(load: float | None) -> str | None:
    """A sentence, where the machine has something else to do; None where it is quiet."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores is None or not records.is_busy(load, cores):
        return None
    return (
        f"the machine is busy (load average {load:.1f} on {counted(cores, 'core')}): times are not "
        "reliable; stop what else runs, or wait"
    )


def _measured(row: Mapping[str, Any], kind: Kind) -> bool:
    return row.get(kind.measured) is not None


def _wide(column: Column) -> int:
    """A column's width: of its head, and of what its cells may hold."""
    head = column[0]
    least = {"±, %": 3, "matmul, share": 6}.get(head, 7)
    return max(least, *map(len, head.split(", ")))


def _name_width(kind: Kind) -> int:
    return WIDTH - sum(_wide(column) + 1 for column in kind.screen)
