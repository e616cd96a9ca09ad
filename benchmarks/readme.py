"""The README's table of losses, made of committed results."""

import re
from collections.abc import Sequence
from pathlib import Path

from fastclip.bench import plots, records
from fastclip.bench.kinds import KINDS, Group, number
from fastclip.bench.records import Record
from fastclip.bench.report import as_good, table

BEGIN, END = "<!-- bench:losses -->", "<!-- /bench -->"
PLOT = Path("docs", "performance.svg")
# the lines of the plot
SHOWN = ("fastclip", "open_clip", "open_clip compiled")


def update(readme: Path, files: Sequence[Path] = ()) -> None:
    """Write the section between the markers anew, and the plot.

    Args:
        readme: the file; the plot's path is relative to its folder.
        files: results; none means those that the section names.

    Raises:
        ValueError: there are no markers, or no files.
        FileNotFoundError: a file does not exist.
    """
    text = readme.read_text()
    root = readme.resolve().parent
    chosen = [Path(file).resolve() for file in files] or [root / name for name in named(text)]
    merged = merge(chosen)
    names = [_relative(file, root) for file in chosen]
    new = replaced(text, section(merged, names))
    panels = plots.clip_panels(merged, SHOWN)
    if panels:
        (root / PLOT).parent.mkdir(exist_ok=True)
        plots.figure(panels, root / PLOT)
    readme.write_text(new)


def named(text: str) -> list[str]:
    """The files that a README's section names, relative to it."""
    found = re.findall(r"`([^`\s]+\.json)`", _between(text))
    if not found:
        raise ValueError(f"the text after {BEGIN} names no JSON file; give files")
    return found


def replaced(text: str, content: str) -> str:
    """The README's text with another section."""
    return text.replace(_between(text), f"\n{content}\n")


def merge(files: Sequence[Path]) -> Record:
    """The results of several files in one; of the same measurement the last counts.

    Raises:
        ValueError: they are of other benchmarks, devices or dtypes.
    """
    found = [records.read(file) for file in files]
    for record in found:
        if record.benchmark != "losses":
            raise ValueError(f"{record.name} is of {record.benchmark}; the table is of losses")
        for what in ("environment", "settings"):
            for name in ("device", "dtype", "autocast"):
                first, other = (getattr(r, what).get(name) for r in (found[0], record))
                if first != other:
                    raise ValueError(
                        f"{record.name} has {name} {other}, {found[0].name} {first}: a table is of "
                        "one machine and precision"
                    )
    rows: dict[tuple[str, int, int], list[dict]] = {}
    for record in found:
        for place in dict.fromkeys((r["operator"], r["n"], r["width"]) for r in record.rows):
            rows[place] = [r for r in record.rows if (r["operator"], r["n"], r["width"]) == place]
    everything = [row for place in rows.values() for row in place]
    last = found[-1]
    return Record(last.name, last.benchmark, last.environment, last.settings, everything)


def section(record: Record, names: Sequence[str]) -> str:
    """What stands between the markers.

    Args:
        record: all results.
        names: of the files that they come from.
    """
    kind = KINDS["losses"]
    groups = [group for group in kind.groups(record) if group.ours and group.rivals]
    there, how = record.environment, record.settings
    width = max(
        (group.key[2] for group in groups), key=lambda w: sum(g.key[2] == w for g in groups)
    )
    groups = [group for group in groups if group.key[2] == width]
    n = max(group.key[1] for group in groups)
    dtype = str(how.get("dtype", "")).removeprefix("torch.")
    precision = f"{dtype}{' under bf16 autocast' if how.get('autocast') else ''}"
    parts = [
        f"Measured on {there['device']} ({there['threads']} threads), torch {there['torch']}, "
        f"{precision}, {str(there['date'])[:10]}, forward and backward, medians of "
        f"{how.get('rounds', 'several')} rounds of all rivals in turn "
        f"({', '.join(f'`{name}`' for name in names)}; `fastclip bench losses` measures your "
        f"machine). {n:,} rows of width {width}; peaks are above the inputs:",
        table(
            ("loss", "ms", "of the roof", "peak MiB", "rival", "its ms", "time", "its peak MiB"),
            [line for group in groups if group.key[1] == n for line in _lines(group)],
        ),
        "`time` is fastclip's over the rival's; the roof is the bare matrix products. "
        + as_good(groups),
    ]
    missing = _left_out(groups)
    if missing:
        parts.append(f"Not run here: {missing}.")
    if plots.clip_panels(record, SHOWN):
        parts.append(f"![CLIP's loss: time and memory against the batch]({PLOT.as_posix()})")
    return "\n\n".join(parts)


def _lines(group: Group) -> list[list[str]]:
    """fastclip's cells in the first line alone."""
    ours = group.ours
    assert ours is not None
    roof = ours.get("roof_share")
    own = [
        f"`{group.key[0]}_loss`",
        number(1e3 * ours["p50"]),
        "" if roof is None else f"{roof:.0%}",
        _peak(ours.get("peak_bytes")),
    ]
    lines = []
    for rival in group.rivals:
        theirs = [number(1e3 * rival["p50"]), f"{group.ratio(rival):.2f} ×"]
        lines.append([*own, rival["rival"], *theirs, _peak(rival.get("peak_bytes"))])
        own = [""] * len(own)
    return lines


def _peak(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def _left_out(groups: Sequence[Group]) -> str:
    """The rivals that ran at no size, with the reason."""
    ran = {row["rival"] for group in groups for row in group.rivals}
    reasons = {
        row["rival"]: row["status"].removeprefix("missing: ")
        for group in groups
        for row in group.left_out
        if row["rival"] not in ran
    }
    return "; ".join(f"{name} ({reason})" for name, reason in reasons.items())


def _between(text: str) -> str:
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise ValueError(f"the README needs {BEGIN} once, and {END} after it")
    return text.split(BEGIN)[1].split(END)[0]


def _relative(file: Path, root: Path) -> str:
    """A file's name in the README.

    Raises:
        ValueError: it lies elsewhere than under the README's folder.
    """
    try:
        return file.relative_to(root).as_posix()
    except ValueError:
        raise ValueError(f"{file} is not under {root}; commit the file there first") from None
