"""The table of losses on a page, made of committed results."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastclip.atomic import write_text
from fastclip.bench import plots, records
from fastclip.bench.kinds import KINDS, Group, number
from fastclip.bench.records import Record
from fastclip.bench.report import failures, table, times

BEGIN, END = "<!-- bench:losses -->", "<!-- /bench -->"
PLOT = Path("docs", "performance.svg")
# what files of one table have in common
_SAME = {
    "environment": ("device", "torch", "threads"),
    "settings": ("dtype", "autocast", "scale", "keep_bytes"),
}
# the lines of the plot
SHOWN = ("fastclip", "open_clip", "open_clip compiled")


def update(page: Path, files: Sequence[Path] = ()) -> None:
    """Write the section between the markers anew, and the README's plot of the same results.

    Args:
        page: the file, in a checkout's first folder or in its docs/.
        files: results; none means those that the section names.

    Raises:
        ValueError: there are no markers, or no files.
        FileNotFoundError: a file does not exist.
    """
    text = page.read_text()
    folder = page.resolve().parent
    root = folder.parent if folder.name == PLOT.parent.name else folder
    chosen = [Path(file).resolve() for file in files] or [root / name for name in named(text)]
    merged = merge(chosen)
    names = [_relative(file, root) for file in chosen]
    new = replaced(text, section(merged, names))
    panels = plots.loss_panels(merged, "clip", main_width(merged), SHOWN)
    if panels:
        (root / PLOT).parent.mkdir(exist_ok=True)
        plots.figure(panels, root / PLOT)
    write_text(page, new)


def named(text: str) -> list[str]:
    """The files that a page's section names, relative to the checkout."""
    found = re.findall(r"`([^`\s]+\.json)`", _cut(text)[1])
    if not found:
        raise ValueError(f"the text after {BEGIN} names no JSON file; give files")
    return found


def replaced(text: str, content: str) -> str:
    """The page's text with another section."""
    head, _, tail = _cut(text)
    return f"{head}\n{content}\n{tail}"


def merge(files: Sequence[Path]) -> Record:
    """The results of several files in one; of the same measurement the last counts.

    Raises:
        ValueError: they are of other benchmarks, devices, versions of torch, threads or settings,
            or a later file would replace rows by those of fewer baselines.
    """
    found = [records.read(file) for file in files]
    for record in found:
        if record.benchmark != "losses":
            raise ValueError(f"{record.name} is of {record.benchmark}; the table is of losses")
        for what, names in _SAME.items():
            for name in names:
                first, other = (getattr(r, what).get(name) for r in (found[0], record))
                if first != other:
                    raise ValueError(
                        f"{record.name} has {name} {other}, {found[0].name} {first}: a table is of "
                        "one machine, version and precision"
                    )
    rows: dict[tuple[str, int, int], list[dict]] = {}
    for record in found:
        for place in dict.fromkeys((r["operator"], r["n"], r["width"]) for r in record.rows):
            here = [r for r in record.rows if (r["operator"], r["n"], r["width"]) == place]
            lacking = _measured(rows.get(place, [])) - _measured(here)
            if lacking:
                raise ValueError(
                    f"{record.name} has {place[0]} of {place[1]} rows without "
                    f"{', '.join(sorted(lacking))}, which an earlier file has; give it first"
                )
            rows[place] = here
    everything = [row for place in rows.values() for row in place]
    last = found[-1]
    days = dict.fromkeys(str(record.environment["date"])[:10] for record in found)
    rounds = dict.fromkeys(str(record.settings.get("rounds", "several")) for record in found)
    settings = {**last.settings, "rounds": " or ".join(rounds)}
    environment = {**last.environment, "date": " and ".join(days)}
    return Record(last.name, last.benchmark, environment, settings, everything)


def _measured(rows: Sequence[dict]) -> set[str]:
    """The names of those that ran."""
    return {row["baseline"] for row in rows if row["status"] == "ok"}


def section(record: Record, names: Sequence[str]) -> str:
    """What stands between the markers.

    Args:
        record: all results.
        names: of the files that they come from.

    Raises:
        ValueError: no baseline ran.
    """
    width = main_width(record)
    everything = [group for group in KINDS["losses"].groups(record) if group.key[2] == width]
    groups = [group for group in everything if group.ours and group.baselines]
    sizes = sorted({group.key[1] for group in groups})
    there, how = record.environment, record.settings
    dtype = str(how.get("dtype", "float32")).removeprefix("torch.")
    precision = f"{dtype}{' under bf16 autocast' if how.get('autocast') else ''}"
    parts = [
        _paragraph(
            f"Measured on {there['device']}, {there.get('threads', '?')} threads, "
            f"torch {there.get('torch', '?')}, {precision}, {_days(there['date'])}, "
            "forward and backward. All baselines run in turn; times are medians of "
            f"{how['rounds']} rounds, 14 times as many below 2 ms "
            f"({', '.join(f'`{name}`' for name in names)}). `fastclip bench losses` measures your "
            f"machine. Features are random, the logit scale is {how.get('scale', '?')}. Rows are "
            "pairs for CLIP, SigLIP and InfoNCE, views for NT-Xent (two an image), views and texts "
            "for MP-NCE (three and one an item), images for SupCon (four a class). With "
            f"{sizes[-1]:,} rows of width {width}:"
        ),
        table(
            (
                "loss",
                "ms",
                "matmul",
                "peak MiB",
                "baseline",
                "baseline ms",
                "× faster",
                "baseline peak MiB",
            ),
            [line for group in groups if group.key[1] == sizes[-1] for line in _lines(group)],
        ),
        _paragraph(
            "peak is the peak of memory above the inputs, gradients included. matmul is the time "
            "of the matrix products alone, in chunks, as a share of fastclip's time: 4 for CLIP, "
            "which computes the similarity matrix S twice where it is not kept, 3 for the others. "
            "Near 100 %, the products take nearly all of the time. The share can be above 100 % "
            "where fastclip computes fewer products, or S stays in the cache."
        ),
    ]
    if len(sizes) > 1:
        parts += [
            _paragraph(
                "The same ratio by number of rows, each against the baseline that is fastest at "
                "that size:"
            ),
            table(("loss", *(f"{n:,}" for n in sizes)), list(_by_size(groups, sizes))),
        ]
    parts.append(_paragraph(_up_to(everything)))
    missing = _left_out(everything)
    if missing:
        parts.append(_paragraph(f"Not run here: {missing}."))
    return "\n\n".join(parts)


def _days(date: str) -> str:
    """A date without its time; those of several files as `merge` joins them."""
    return " and ".join(day[:10] for day in str(date).split(" and "))


def main_width(record: Record) -> int:
    """The width at which most losses stand beside a baseline.

    Raises:
        ValueError: no baseline ran.
    """
    groups = KINDS["losses"].groups(record)
    widths = [group.key[2] for group in groups if group.ours and group.baselines]
    if not widths:
        raise ValueError(f"{record.name} has no loss beside a baseline that ran")
    return max(widths, key=widths.count)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _by_size(groups: Sequence[Group], sizes: Sequence[int]) -> Iterator[list[str]]:
    for name in dict.fromkeys(group.key[0] for group in groups):
        best = {g.key[1]: times(g, g.baselines[0]) for g in groups if g.key[0] == name}
        yield [f"`{name}_loss`", *(f"{best[n]} ×" if n in best else "" for n in sizes)]


def _lines(group: Group) -> list[list[str]]:
    """fastclip's cells in the first line alone."""
    ours = group.ours
    assert ours is not None
    share = ours.get("matmul_share")
    own = [
        f"`{group.key[0]}_loss`",
        number(1e3 * ours["p50"]),
        "" if share is None else "?" if share != share else f"{share:.0%}",
        _peak(ours.get("peak_bytes")),
    ]
    lines = []
    for baseline in group.baselines:
        theirs = [number(1e3 * baseline["p50"]), f"{times(group, baseline)} ×"]
        lines.append([*own, baseline["baseline"], *theirs, _peak(baseline.get("peak_bytes"))])
        own = [""] * len(own)
    return lines


def _peak(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def _up_to(groups: Sequence[Group]) -> str:
    """A sentence with the largest size of each loss at which a baseline is as fast."""
    largest: dict[str, int] = {}
    for group in groups:
        name, n, *_ = group.key
        if group.as_good:
            largest[name] = max(n, largest.get(name, 0))
    if not largest:
        return f"No baseline that ran is as fast at any of these sizes.{failures(groups)}"
    places = ", ".join(f"{n:,} rows (`{name}_loss`)" for name, n in largest.items())
    message = f"A baseline is as fast, within fastclip's spread, or faster at up to {places}."
    return message + failures(groups)


def _left_out(groups: Sequence[Group]) -> str:
    """Baselines that did not run, by reason; with losses and sizes where they ran for others."""
    ran = {(group.key[0], row["baseline"]) for group in groups for row in group.baselines}
    somewhere = {baseline for _, baseline in ran}
    losses: dict[tuple[str, str], dict[str, None]] = {}
    sizes: dict[tuple[str, str], set[int]] = {}
    for group in groups:
        loss, n, *_ = group.key
        for row in group.left_out:
            place = row["status"].removeprefix("missing: "), row["baseline"]
            losses.setdefault(place, {})[loss] = None
            if (loss, row["baseline"]) in ran:
                sizes.setdefault(place, set()).add(n)
    reasons: dict[str, list[str]] = {}
    for (reason, baseline), names in losses.items():
        message = f"{baseline} for {', '.join(names)}" if baseline in somewhere else baseline
        if rows := sorted(sizes.get((reason, baseline), ())):
            message += f" of {', '.join(f'{n:,}' for n in rows)} rows"
        reasons.setdefault(reason, []).append(message)
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in reasons.items())


def _cut(text: str) -> tuple[str, str, str]:
    """The text up to the first marker, between, and from the second on."""
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise ValueError(f"the page needs {BEGIN} once, and {END} after it")
    head, rest = text.split(BEGIN)
    old, tail = rest.split(END, maxsplit=1)
    return head + BEGIN, old, END + tail


def _relative(file: Path, root: Path) -> str:
    """A file's name on the page.

    Raises:
        ValueError: it lies outside the checkout.
    """
    try:
        return file.relative_to(root).as_posix()
    except ValueError:
        raise ValueError(f"{file} is not under {root}; commit the file there first") from None
