"""Two files of one benchmark, row by row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastclip.bench.kinds import KINDS
from fastclip.bench.records import Record, is_busy
from fastclip.messages import counted

# What is compared, where it is not the median time.
_MEASURED = {"memory": "bytes kept for the backward", "data": "images a second"}


@dataclass(frozen=True)
class Pair:
    """One row of both files.

    Attributes:
        key: what names it.
        times: how many times better the later value is; see `measured`.
        least, greatest: what the 20th and 80th percentiles of both allow at least and at most;
            equal where a file has no spread.
    """

    key: tuple[Any, ...]
    times: float
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
        devices_differ = f"{before.name} is of {devices[0]}, {after.name} of {devices[1]}"
        if not across_devices:
            raise ValueError(
                f"{devices_differ}: a ratio says nothing of the code; --across-devices compares "
                "all the same"
            )
        yield devices_differ
    for what in ("environment", "settings"):
        one, other = (getattr(record, what) for record in (before, after))
        # a setting that only one version knows is not a difference of the two measurements
        apart = ("device", "date", "load_average", "commit")
        for name in (name for name in one if name in other and name not in apart):
            if one[name] != other[name]:
                yield f"{name} is {one[name]} in {before.name}, {other[name]} in {after.name}"
    for record in (before, after):
        load, threads = record.environment.get("load_average"), record.environment.get("threads")
        if threads is not None and is_busy(load, threads):
            yield (
                f"{record.name} was measured on a busy machine (load average {load:.1f} with "
                f"{counted(threads, 'thread')}): its times are not reliable"
            )


def compare(before: Record, after: Record) -> list[Pair]:
    """The rows that both files have.

    Raises:
        ValueError: there are none.
    """
    earlier, later = values(before), values(after)
    pairs = []
    for key, new in later.items():
        if key not in earlier:
            continue
        old, field = earlier[key], _field(before)
        values_of = [(old[field], new[field])] * 3
        if all(row.get(p) for row in (new, old) for p in ("p20", "p80")):
            values_of[1:] = [(old["p20"], new["p80"]), (old["p80"], new["p20"])]
        more_is_better = KINDS[before.benchmark].more_is_better
        times, *spread = (b / a if more_is_better else a / b for a, b in values_of)
        pairs.append(Pair(key, times, min(spread), max(spread)))
    if not pairs:
        raise ValueError(f"{before.name} and {after.name} have no row in common")
    return pairs


def failures(before: Record, after: Record) -> Iterator[str]:
    """The rows that ran in one of the files alone: a sentence each, or one for all it lacks."""
    for ran, failed in ((before, after), (after, before)):
        found, those = values(ran), values(failed)
        for row in failed.rows:
            key = failed.key(row)
            if key in found and key not in those:
                yield f"{_name(key)} ran in {ran.name} alone; in {failed.name}: {row['status']}"
        present = {failed.key(row) for row in failed.rows}
        lacking = [_name(key) for key in found if key not in present]
        if lacking:
            such = lacking[0] if len(lacking) == 1 else f"{len(lacking)} rows, first {lacking[0]}"
            yield f"{ran.name} alone has {such}"


def values(record: Record) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The rows that have what is compared, by what names them."""
    return {record.key(row): row for row in record.rows if row.get(_field(record))}


def measured(record: Record) -> str:
    """What is compared, in words."""
    return _MEASURED.get(record.benchmark, "median time")


def _field(record: Record) -> str:
    return "saved_bytes" if record.benchmark == "memory" else "p50"


def _name(key: tuple[Any, ...]) -> str:
    return " ".join(map(str, key))


# names up to so many characters stand in their row's line
_LONGEST = 44


def lines(pairs: Sequence[Pair], benchmark: str) -> list[str]:
    """A table: how many times better B is, the spread, and a mark where it leaves out 1."""
    wide = min(max(len(_name(pair.key)) for pair in pairs), _LONGEST)
    found = [f"{'':{wide}} {f'B {KINDS[benchmark].better}':>10} {'spread':^15}".rstrip()]
    for pair in pairs:
        name = _name(pair.key)
        if len(name) > wide:
            found.append(name)
            name = ""
        mark = " differs" if pair.differs else ""
        spread = f"{pair.least:.3f} .. {pair.greatest:.3f}"
        found.append(f"{name:{wide}} {pair.times:10.3f} {spread:^15}{mark}".rstrip())
    changed = sum(pair.differs for pair in pairs)
    return [*found, f"{changed} of {counted(len(pairs), 'row')} beyond the spread"]
