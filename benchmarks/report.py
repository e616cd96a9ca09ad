"""The Markdown report of results: fastclip beside the best baseline, and every row."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastclip.atomic import write_text
from fastclip.bench import plots, screen
from fastclip.bench.kinds import KINDS, UNRELIABLE, Group, Kind, Row, number
from fastclip.bench.records import Record
from fastclip.messages import counted

# What is reported of settings, where it is there.
_SETTINGS = ("dtype", "autocast", "precision", "grad_clip_norm", "scale", "rounds", "steps")


def write(records: Sequence[Record], target: Path) -> None:
    """Write the report to a Markdown file, and its plots beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    images = {
        index: plots.draw(record, target.parent, f"{target.stem}-{index}-{record.benchmark}")
        for index, record in enumerate(records)
    }
    write_text(target, markdown(records, images) + "\n")


def markdown(records: Sequence[Record], images: dict[int, list[str]] | None = None) -> str:
    """The report; `images` are files, relative to it, of each record by its place."""
    parts = ["# fastclip beside its baselines"]
    for index, record in enumerate(records):
        kind = KINDS[record.benchmark]
        parts += [f"## {kind.title}", stamp(record), *_beside_the_best(record, kind)]
        parts += [f"![{kind.title}]({name})" for name in (images or {}).get(index, [])]
        parts += ["All rows:", _all_rows(record, kind)]
        if any(group.doubtful for group in kind.groups(record)):
            parts.append(UNRELIABLE)
    return "\n\n".join(part for part in parts if part)


def printed(records: Sequence[Record]) -> str:
    """The same for a terminal, in as many columns as `fastclip bench` prints."""
    parts = []
    for record in records:
        kind = KINDS[record.benchmark]
        groups = list(kind.groups(record))
        rows = [line for group in groups for line in screen.lines(group)]
        texts = [stamp(record), as_good(groups)]
        parts += [kind.title, *(textwrap.fill(text, screen.WIDTH) for text in texts)]
        parts += ["\n".join([*screen.heads(kind), *rows, *screen.closing(groups)])]
    return "\n\n".join(part for part in parts if part)


def stamp(record: Record) -> str:
    """Where, when and how it was measured."""
    there = record.environment
    versions = [
        f"{name} {there[name]}" for name in ("fastclip", "torch", "triton") if there.get(name)
    ]
    settings = [f"{name} {record.settings[name]}" for name in _SETTINGS if _said(record, name)]
    threads = there.get("threads", "an unknown number of")
    threads = counted(threads, "thread") if isinstance(threads, int) else f"{threads} threads"
    where = f"{there.get('device', 'unknown device')}, {threads}"
    when, load = str(there.get("date", "no date"))[:10], there.get("load_average")
    at_start = [] if load is None else [f"load average {load} at the start"]
    return f"`{record.name}`: {when}, {where}; {', '.join([*versions, *settings, *at_start])}."


def _said(record: Record, name: str) -> bool:
    return record.settings.get(name) not in (None, False)


def _beside_the_best(record: Record, kind: Kind) -> Iterator[str]:
    unit = kind.unit
    header = [*_heads(kind), f"fastclip, {unit}", "best baseline", f"its {unit}", kind.better]
    groups, lines = list(kind.groups(record)), []
    for group in groups:
        ours = group.ours
        if ours is None:
            continue
        cells = [*_key_cells(group), _compared(group, ours)]
        if group.baselines:
            best = group.baselines[0]
            cells += [best[kind.name], _compared(group, best), times(group, best)]
        else:
            cells += ["none ran", "", ""]
        lines.append(cells)
    if lines:
        yield table(header, lines)
    if lines or any(group.ours_failed for group in groups):
        yield as_good(groups)


def as_good(groups: Sequence[Group]) -> str:
    """Sentences that name all places where a baseline is as good as fastclip, or runs alone."""
    kind = groups[0].kind
    memory = kind.measured == "peak_bytes"
    places = []
    for group in groups:
        if group.as_good:
            those = ", ".join(f"{times(group, row)} for {row[kind.name]}" for row in group.as_good)
            places.append(f"{group.place} ({those})")
    failed = failures(groups)
    if not any(group.ours and group.baselines for group in groups):
        return failed.strip() or "No baseline ran."
    if not places:
        result = "needs as little" if memory else "is as fast"
        return f"No baseline that ran {result} at any of these sizes.{failed}"
    result = (
        "needs as little, or less" if memory else "is as fast, within fastclip's spread, or faster"
    )
    return f"A baseline {result} ({kind.better}) at: {'; '.join(places)}.{failed}"


def failures(groups: Sequence[Group]) -> str:
    """A further sentence where fastclip failed."""
    alone = "; ".join(group.place for group in groups if group.ours_failed)
    return f" fastclip failed where a baseline ran, at: {alone}." if alone else ""


def times(group: Group, row: Row) -> str:
    """How many times as fast as a baseline fastclip is, or how many times less it needs."""
    found = group.times(row)
    return "" if found is None else f"{found:.2f}"


def _compared(group: Group, row: Row) -> str:
    value = group.value(row)
    if group.kind.more_is_better:
        return f"{value:,.0f}"
    if group.kind.measured == "peak_bytes":
        return number(value / 2**20)
    return number(1e3 * value)


def _all_rows(record: Record, kind: Kind) -> str:
    header = [*_heads(kind), "", *(name for name, _ in kind.columns)]
    lines = []
    for group in kind.groups(record):
        for row in group.rows:
            cells = [*_key_cells(group), row[kind.name]]
            if row["status"] == "ok":
                cells += [cell(row) for _, cell in kind.columns]
            else:
                cells += [row["status"], *[""] * (len(kind.columns) - 1)]
            lines.append(cells)
    return table(header, lines)


def _heads(kind: Kind) -> list[str]:
    names = {"operator": "loss", "width": "D", "batch_size": "batch"}
    return [names.get(field, field) for field in kind.group]


def _key_cells(group: Group) -> list[str]:
    return [
        {True: "yes", False: ""}[value]
        if isinstance(value, bool)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
        for value in group.key
    ]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    # a cell of an error message may hold anything
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in rows)
