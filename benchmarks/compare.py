"""Two files of one benchmark, row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastclip.bench.records import Record


@dataclass(frozen=True)
class Pair:
    """One row of both files.

    Attributes:
        key: what names it.
        ratio: the later median over the earlier.
        least, greatest: from the later 20th percentile over the earlier 80th to the later 80th
            over the earlier 20th; equal where a file has no spread.
    """

    key: tuple[Any, ...]
    ratio: float
    least: float
    greatest: float

    @property
    def differs(self) -> bool:
        """Whether the spread leaves out 1."""
        return not self.least <= 1 <= self.greatest


def differences(before: Record, after: Record, across_devices: bool = False) -> Iterator[str]:
    """What else than the code may have made a difference, a sentence each.

    Raises:
        ValueError: the files cannot be compared: other benchmarks, or other devices unless
            `across_devices`.
    """
    if before.benchmark != after.benchmark:
        raise ValueError(
            f"{before.name} is of {before.benchmark}, {after.name} of {after.benchmark}; give two "
            "files of one benchmark"
        )
    devices = [record.environment.get("device") for record in (before, after)]
    if devices[0] != devices[1]:
        told = f"{before.name} is of {devices[0]}, {after.name} of {devices[1]}"
        if not across_devices:
            raise ValueError(
                f"{told}: a ratio says nothing of the code; --across-devices compares all the same"
            )
        yield told
    for what in ("environment", "settings"):
        one, other = (getattr(record, what) for record in (before, after))
        # a setting that only one version knows is no difference of the two measurements
        for name in (name for name in one if name in other and name not in ("device", "date")):
            if one[name] != other[name]:
                yield f"{name} is {one[name]} in {before.name}, {other[name]} in {after.name}"


def compare(before: Record, after: Record) -> list[Pair]:
    """The rows that both files have.

    Raises:
        ValueError: there are none.
    """
    measured = "saved_bytes" if before.benchmark == "memory" else "p50"
    earlier = {before.key(row): row for row in before.rows if row.get(measured)}
    pairs = []
    for row in after.rows:
        old = earlier.get(after.key(row))
        if old is None or not row.get(measured):
            continue
        spread = [row[measured] / old[measured]] * 2
        if all(r.get(p) for r in (row, old) for p in ("p20", "p80")):
            spread = [row["p20"] / old["p80"], row["p80"] / old["p20"]]
        pairs.append(Pair(after.key(row), row[measured] / old[measured], *spread))
    if not pairs:
        raise ValueError(f"{before.name} and {after.name} have no row in common")
    return pairs


def lines(pairs: Sequence[Pair]) -> list[str]:
    """A table: ratio, spread, and a mark where it leaves out 1."""
    names = [" ".join(map(str, pair.key)) for pair in pairs]
    wide = max(map(len, names))
    found = [f"{'':{wide}}  {'B / A':>7}  {'spread':^15}"]
    for name, pair in zip(names, pairs, strict=True):
        mark = "  differs" if pair.differs else ""
        spread = f"{pair.least:.3f} .. {pair.greatest:.3f}"
        found.append(f"{name:{wide}}  {pair.ratio:7.3f}  {spread:^15}{mark}".rstrip())
    found.append(f"{sum(pair.differs for pair in pairs)} of {len(pairs)} differ beyond the spread")
    return found
