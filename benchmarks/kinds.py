"""What the rows of each benchmark mean: which stand side by side, and how a row is read.

Ratios have one direction everywhere: above 1, fastclip is better.
"""

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
        columns: what a report shows of a row besides group and name; heads have the unit after a
            comma.
        screen: what `fastclip bench` prints of it, in 80 columns.
        ignored: names that are no baselines.
        more_is_better: of what is compared.
    """

    title: str
    group: tuple[str, ...]
    name: str
    ours: str
    measured: str
    columns: tuple[Column, ...]
    screen: tuple[Column, ...]
    ignored: tuple[str, ...] = ()
    more_is_better: bool = False

    @property
    def unit(self) -> str:
        """Of what is compared, as it is shown."""
        return {"peak_bytes": "MiB", "p50": "images/s" if self.more_is_better else "ms"}[
            self.measured
        ]

    @property
    def better(self) -> str:
        """The head of `Group.times`."""
        return "× less" if self.measured == "peak_bytes" else "× faster"

    def groups(self, record: Record) -> Iterator["Group"]:
        """The rows of a record, side by side, in the file's order.

        A row that was compared has `times`, see `Group.times`; a matmul share that cannot be is
        NaN.
        """
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        most = most_share(record.settings)
        for row in record.rows:
            doubtful = (row.get("matmul_share") or 0.0) > most
            read = {**row, "matmul_share": math.nan} if doubtful else dict(row)
            found.setdefault(tuple(row[field] for field in self.group), []).append(read)
        for key, rows in found.items():
            group = Group(self, key, rows)
            for row in rows:
                if row is not group.ours and row[self.name] not in self.ignored:
                    row["times"] = group.times(row)
            yield group


@dataclass(frozen=True)
class Group:
    """Rows that stand side by side."""

    kind: Kind
    key: tuple[Any, ...]
    rows: list[dict[str, Any]]

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
        """The baselines that are faster, or whose spread (p20 to p80) overlaps fastclip's."""
        ours = self.ours
        if ours is None:
            return []
        if self.kind.more_is_better:
            bound = ours.get("p20") or self.value(ours)
            return [row for row in self.baselines if self.value(row) >= bound]
        spread = ours.get("p80") if self.kind.measured == "p50" else None
        bound = spread or self.value(ours)
        low = "p20" if self.kind.measured == "p50" else self.kind.measured
        return [row for row in self.baselines if (row.get(low) or self.value(row)) <= bound]

    @property
    def doubtful(self) -> bool:
        """Whether a matmul share cannot be, see `most_share`."""
        return any(row.get("matmul_share") != row.get("matmul_share") for row in self.rows)

    def is_baseline(self, row: Row) -> bool:
        """Whether it is somebody else's."""
        name = row[self.kind.name]
        return not name.startswith("fastclip") and name not in self.kind.ignored

    def value(self, row: Row) -> Any:
        """What is compared; None where it was not measured."""
        return row.get(self.kind.measured)

    def times(self, row: Row) -> float | None:
        """How many times as fast as this row fastclip is, or how many times less it needs."""
        ours = self.ours
        if ours is None or not self.value(row) or not self.value(ours):
            return None
        ratio = self.value(row) / self.value(ours)
        return 1 / ratio if self.kind.more_is_better else ratio

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
    """A cell in Python's format; "?" for what cannot be."""

    def cell(row: Row) -> str:
        value = row.get(field)
        return "" if value is None else "?" if value != value else format(value, form)

    return cell


def most_share(settings: Mapping[str, Any]) -> float:
    """A matmul share above this says that the machine was busy, not how much was saved.

    Of the products that are counted fastclip computes half at the least. On a CPU they are of
    float32, and hardware may have those of 16 bits many times as fast.
    """
    narrow = settings.get("autocast") or "16" in str(settings.get("dtype"))
    return 30.0 if narrow else 4.0


UNRELIABLE = (
    "? is a matmul share that cannot be: the machine was busy with something else. No time "
    "beside it is reliable; measure again."
)


def _spread(row: Row) -> str:
    """Half of what lies between the 20th and the 80th percentile, in percent of the median."""
    if any(not row.get(name) for name in ("p20", "p50", "p80")):
        return ""
    return f"{50 * (row['p80'] - row['p20']) / row['p50']:.0f}"


def _times(row: Row) -> str:
    return number(row.get("times"))


def _same_bits(row: Row) -> str:
    return {None: "", True: "same", False: "vary"}[row.get("repeatable")]


_TIMES = tuple((f"{name}, ms", milliseconds(name)) for name in ("p20", "p50", "p80"))
_FASTER: Column = ("fastclip, × faster", _times)
_MEDIAN: tuple[Column, ...] = (("fwd+bwd, ms", milliseconds("p50")), ("±, %", _spread), _FASTER)
_FORWARD: Column = ("forward, ms", milliseconds("forward"))
_PEAK: Column = ("peak, MiB", mebibytes("peak_bytes"))
_ERROR: Column = ("dX, error", plain("error", ".1e"))
_SHARE: Column = ("matmul, share", plain("matmul_share", ".0%"))

KINDS = {
    "losses": Kind(
        "Losses, forward and backward",
        ("operator", "n", "width"),
        "baseline",
        "fastclip",
        "p50",
        (_FORWARD, *_TIMES, _FASTER, _SHARE, _PEAK, _ERROR, ("bits", _same_bits)),
        (_FORWARD, *_MEDIAN, _SHARE, _PEAK, _ERROR),
        ignored=("bare products",),
    ),
    "attention": Kind(
        "Attention of short sequences, forward and backward",
        ("n", "width", "causal"),
        "baseline",
        "fastclip",
        "p50",
        (_FORWARD, *_TIMES, _FASTER, _PEAK, ("dQ, error", _ERROR[1]), ("bits", _same_bits)),
        (_FORWARD, *_MEDIAN, _PEAK, ("dQ, error", _ERROR[1])),
    ),
    "data": Kind(
        "Loading",
        ("task",),
        "loader",
        "fastclip, torchvision",
        "p50",
        (
            *((f"{name}, images/s", plain(name, ",.0f")) for name in ("p20", "p50", "p80")),
            _FASTER,
        ),
        (("median, images/s", plain("p50", ",.0f")), *_MEDIAN[1:]),
        more_is_better=True,
    ),
    "train-step": Kind(
        "A whole training step",
        ("model", "batch_size"),
        "baseline",
        "fastclip",
        "p50",
        (
            *_TIMES,
            _FASTER,
            ("samples/s", plain("samples_per_second", ",.1f")),
            _PEAK,
            ("loss", plain("loss", ".4f")),
            ("differs from open_clip's, relative", plain("loss_difference", ".1e")),
        ),
        (
            ("a step, ms", milliseconds("p50")),
            ("±, %", _spread),
            ("rate, samples/s", plain("samples_per_second", ",.1f")),
            _FASTER,
            _PEAK,
            ("loss, differs", plain("loss_difference", ".1e")),
        ),
    ),
    "memory": Kind(
        "Memory of the losses",
        ("operator", "n", "width"),
        "baseline",
        "fastclip",
        "peak_bytes",
        (
            ("kept, MiB", mebibytes("saved_bytes")),
            ("its exponent in n", plain("saved_exponent", ".2f")),
            ("peak, MiB", mebibytes("peak_bytes")),
            ("its exponent in n", plain("peak_exponent", ".2f")),
            ("fastclip, × less", _times),
        ),
        (
            ("kept, MiB", mebibytes("saved_bytes")),
            ("grows, n to the", plain("saved_exponent", ".2f")),
            _PEAK,
            ("grows, n to the", plain("peak_exponent", ".2f")),
            ("fastclip, × less", _times),
        ),
    ),
    "collectives": Kind(
        "Losses over several processes, forward and backward",
        ("operator", "ranks", "n", "width"),
        "baseline",
        "fastclip gather",
        "p50",
        (
            ("received, MiB", mebibytes("received_bytes")),
            *_TIMES,
            _FASTER,
            ("kept, MiB", mebibytes("saved_bytes")),
            _ERROR,
        ),
        (
            ("received, MiB", mebibytes("received_bytes")),
            *_MEDIAN,
            ("kept, MiB", mebibytes("saved_bytes")),
            _ERROR,
        ),
    ),
}
