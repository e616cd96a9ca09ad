"""What the rows of each benchmark mean: which stand side by side, and how a row is read."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastclip.bench.records import Record

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Kind:
    """How one benchmark's rows are read.

    Attributes:
        title: a heading.
        group: fields that rows which stand side by side have in common.
        name: the field that distinguishes them.
        ours: the name of fastclip's row; others that begin like it are fastclip's too.
        measured: the field that is compared.
        columns: what is shown of a row besides group and name.
        ignored: names that are no baselines.
        more_is_better: of what is compared.
    """

    title: str
    group: tuple[str, ...]
    name: str
    ours: str
    measured: str
    columns: tuple[Column, ...]
    ignored: tuple[str, ...] = ()
    more_is_better: bool = False

    def groups(self, record: Record) -> Iterator["Group"]:
        """The rows of a record, side by side, in the file's order."""
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in record.rows:
            found.setdefault(tuple(row[field] for field in self.group), []).append(row)
        for key, rows in found.items():
            yield Group(self, key, rows)


@dataclass(frozen=True)
class Group:
    """Rows that stand side by side."""

    kind: Kind
    key: tuple[Any, ...]
    rows: list[Row]

    @property
    def ours(self) -> Row | None:
        """fastclip's row, where it was measured."""
        for row in self.rows:
            if row[self.kind.name] == self.kind.ours and self.value(row) is not None:
                return row
        return None

    @property
    def ours_failed(self) -> bool:
        """Whether fastclip did not run where a baseline did."""
        failed = [
            r for r in self.rows if r[self.kind.name] == self.kind.ours and r["status"] != "ok"
        ]
        return bool(failed and self.baselines)

    @property
    def baselines(self) -> list[Row]:
        """The baselines that ran, best first."""
        ran = [row for row in self.rows if self.is_baseline(row) and self.value(row) is not None]
        return sorted(ran, key=self.value, reverse=self.kind.more_is_better)

    @property
    def left_out(self) -> list[Row]:
        """The baselines that did not run."""
        return [row for row in self.rows if self.is_baseline(row) and self.value(row) is None]

    @property
    def as_good(self) -> list[Row]:
        """The baselines whose median lies within or beyond fastclip's spread."""
        ours = self.ours
        if ours is None:
            return []
        if self.kind.more_is_better:
            bound = ours.get("p20") or self.value(ours)
            return [row for row in self.baselines if self.value(row) >= bound]
        spread = ours.get("p80") if self.kind.measured == "p50" else None
        bound = spread or self.value(ours)
        return [row for row in self.baselines if self.value(row) <= bound]

    def is_baseline(self, row: Row) -> bool:
        """Whether it is somebody else's."""
        name = row[self.kind.name]
        return not name.startswith("fastclip") and name not in self.kind.ignored

    def value(self, row: Row) -> Any:
        """What is compared; None where it was not measured."""
        return row.get(self.kind.measured)

    def ratio(self, row: Row) -> float | None:
        """What is compared, fastclip's over this row's: below 1, fastclip takes less."""
        ours = self.ours
        if ours is None or not self.value(row):
            return None
        return self.value(ours) / self.value(row)

    @property
    def place(self) -> str:
        """The group in words."""
        words = []
        for field, value in zip(self.kind.group, self.key, strict=True):
            if isinstance(value, bool):
                words += [field] * value
            elif isinstance(value, str):
                words.append(value)
            else:
                words.append(f"{_SHORT.get(field, field)} = {value:,}")
        return " ".join(words)


_SHORT = {"width": "D", "batch_size": "batch"}


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, thousands apart, never as a power of ten."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    whole = len(str(int(abs(rounded)))) if 1 <= abs(rounded) < math.inf else 0
    return f"{rounded:,.{max(digits - whole, 0)}f}"


def milliseconds(field: str) -> Callable[[Row], str]:
    """A cell of a time in seconds."""
    return lambda row: "" if row.get(field) is None else number(1e3 * row[field])


def mebibytes(field: str) -> Callable[[Row], str]:
    """A cell of a number of bytes."""
    return lambda row: "" if row.get(field) is None else number(row[field] / 2**20)


def plain(field: str, form: str) -> Callable[[Row], str]:
    """A cell in Python's format."""
    return lambda row: "" if row.get(field) is None else format(row[field], form)


def _same_bits(row: Row) -> str:
    return {None: "", True: "same", False: "vary"}[row.get("repeatable")]


_TIMES = tuple((name, milliseconds(name)) for name in ("p20", "p50", "p80"))

_COSTS = (
    ("MiB", mebibytes("peak_bytes")),
    ("error", plain("error", ".1e")),
    ("bits", _same_bits),
)

KINDS = {
    "losses": Kind(
        "Losses, forward and backward, ms",
        ("operator", "n", "width"),
        "baseline",
        "fastclip",
        "p50",
        (
            ("forward", milliseconds("forward")),
            *_TIMES,
            ("matmul", plain("matmul_share", ".0%")),
            *_COSTS,
        ),
        ignored=("bare products",),
    ),
    "attention": Kind(
        "Attention of short sequences, forward and backward, ms",
        ("n", "width", "causal"),
        "baseline",
        "fastclip",
        "p50",
        (
            ("forward", milliseconds("forward")),
            *_TIMES,
            *_COSTS,
        ),
    ),
    "data": Kind(
        "Loading, images a second",
        ("task",),
        "loader",
        "fastclip, torchvision",
        "p50",
        tuple((name, plain(name, ",.0f")) for name in ("p20", "p50", "p80")),
        more_is_better=True,
    ),
    "train-step": Kind(
        "A whole training step, ms",
        ("model", "batch_size"),
        "baseline",
        "fastclip",
        "p50",
        (
            *_TIMES,
            ("samples/s", plain("samples_per_second", ",.1f")),
            ("speed", plain("ratio", ".3f")),
            ("MiB", mebibytes("peak_bytes")),
            ("loss", plain("loss", ".4f")),
            ("differs", plain("loss_difference", ".1e")),
        ),
    ),
    "memory": Kind(
        "Memory of the losses, MiB",
        ("operator", "n", "width"),
        "baseline",
        "fastclip",
        "peak_bytes",
        (
            ("saved", mebibytes("saved_bytes")),
            ("its exponent", plain("saved_exponent", ".2f")),
            ("peak", mebibytes("peak_bytes")),
            ("its exponent", plain("peak_exponent", ".2f")),
        ),
    ),
    "collectives": Kind(
        "Losses over several processes, forward and backward, ms",
        ("operator", "ranks", "n", "width"),
        "baseline",
        "fastclip gather",
        "p50",
        (
            ("MiB received", mebibytes("received_bytes")),
            *_TIMES,
            ("MiB saved", mebibytes("saved_bytes")),
            ("error", plain("error", ".1e")),
        ),
    ),
}
