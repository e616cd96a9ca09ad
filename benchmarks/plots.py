"""Curves of results on logarithmic axes and bars of ratios, in one style, each named at its end.

Lines and letters have colors of medium brightness on no background, so that a light and a dark
page serve.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text
from fastclip.bench.kinds import KINDS
from fastclip.bench.records import Record

OURS = "#e8612c"
THEIRS = ("#4a8fe7", "#8a63d2", "#2fa084", "#c0417e", "#7d8590", "#b08d2b")
INK = "#7d8590"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a title, the axes' names, and lines by name."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]


@dataclass(frozen=True)
class Bars:
    """Times of baselines over fastclip's: a title, and of each bar its name, length and text."""

    title: str
    bars: list[tuple[str, float, str]]


def draw(record: Record, folder: Path, stem: str) -> list[str]:
    """Draw a record's curves as SVG files in a folder; returns their names.

    Where a record has one size only there is nothing to draw.
    """
    names = []
    for label, panels in _FIGURES.get(record.benchmark, _none)(record):
        if panels:
            names.append(f"{stem}-{label}.svg")
            figure(panels, folder / names[-1])
    return names


def figure(panels: Sequence[Panel | Bars], path: Path) -> None:
    """Draw panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        # the same file every time
        "svg.hashsalt": "fastclip",
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with plt.rc_context(style):
        made, axes = plt.subplots(
            1, len(panels), figsize=(4.8 * len(panels), 3.2), squeeze=False, layout="constrained"
        )
        for panel, place in zip(panels, axes[0], strict=True):
            if isinstance(panel, Bars):
                _draw_bars(panel, place)
            else:
                _draw_panel(panel, place)
        text = io.StringIO()
        made.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(made)
    write_text(path, text.getvalue())


def loss_panels(
    record: Record, operator: str, width: int, names: Sequence[str]
) -> list[Panel | Bars]:
    """How much faster each loss is at the largest n, and one loss's peak memory against n.

    Args:
        record: of losses.
        operator: whose memory is drawn.
        width: of the features.
        names: the baselines whose memory is drawn.
    """
    chosen = [
        row
        for row in record.rows
        if row["operator"] == operator and row["width"] == width and row["baseline"] in names
    ]
    memory = _lines(chosen, "n", "peak_bytes", 2**-20)
    panels: list[Panel | Bars] = []
    n, bars = _faster(record, width)
    if bars:
        panels.append(Bars(f"× faster than the fastest baseline, {n:,} rows", bars))
    if memory:
        panels.append(Panel(f"{operator}_loss", "rows", "peak extra memory in MiB", memory))
    return panels


def _faster(record: Record, width: int) -> tuple[int, list[tuple[str, float, str]]]:
    """The largest n, and of each loss there the fastest baseline's time over fastclip's."""
    groups = [group for group in KINDS["losses"].groups(record) if group.key[2] == width]
    n = max((group.key[1] for group in groups if group.ours), default=0)
    bars = []
    for group in groups:
        if group.key[1] == n and group.ours and group.baselines:
            best = group.baselines[0]
            ratio = best["p50"] / group.ours["p50"]
            bars.append((f"{group.key[0]}_loss", ratio, f"{ratio:.1f} ×  {best['baseline']}"))
    return n, bars


def _draw_bars(bars: Bars, axes: Any) -> None:
    """Downward in their order; a line where fastclip is no faster."""
    names, lengths, texts = zip(*bars.bars, strict=True)
    places = range(len(names))
    axes.barh(places, lengths, color=OURS, height=0.62)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=0.8, linestyle="--")
    # room for the texts beside the longest bar
    axes.set_xlim(0, max(lengths) * 1.7)
    axes.set_xticks(range(math.ceil(max(lengths)) + 1))
    axes.set_title(bars.title)
    for place, length, text in zip(places, lengths, texts, strict=True):
        axes.annotate(
            text, (length, place), (6, 0), textcoords="offset points", color=INK, va="center"
        )
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_panel(panel: Panel, axes: Any) -> None:
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        NullFormatter,
        NullLocator,
    )

    axes.set(xscale="log", yscale="log", xlabel=panel.x, title=f"{panel.title}: {panel.y}")
    ends = []
    colors = iter(THEIRS * (1 + len(panel.lines) // len(THEIRS)))
    for name, points in panel.lines.items():
        ours = name.startswith("fastclip")
        color = OURS if name in ("fastclip", "fastclip gather") else next(colors)
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=color, linewidth=2.4 if ours else 1.6, marker="o", markersize=4)
        ends.append((xs[-1], ys[-1], name, color))
    ticks = _apart(sorted({x for points in panel.lines.values() for x, _ in points}))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(panel) < 2 else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(True, which="major", color=INK, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    low, high = axes.get_ylim()
    # names that would lie over each other are pushed down
    step, last = (high / low) ** 0.065, math.inf
    for x, y, name, color in sorted(ends, key=lambda end: -end[1]):
        last = min(y, last / step)
        axes.annotate(name, (x, last), (8, 0), textcoords="offset points", color=color, va="center")


def _apart(values: Sequence[float]) -> list[float]:
    """The last of the values, and those before it whose numbers have room on the axis."""
    least = (values[-1] / values[0]) ** 0.13
    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] / value >= least:
            kept.append(value)
    return kept


def _decades(panel: Panel) -> float:
    values = [y for points in panel.lines.values() for _, y in points]
    return math.log10(max(values) / min(values))


def _two(rows: Sequence[dict[str, Any]], field: str, x: str, title: str) -> list[Panel]:
    """Time and peak memory against a field."""
    lines = (_lines(rows, field, "p50", 1e3), _lines(rows, field, "peak_bytes", 2**-20))
    names = ("ms, forward and backward", "peak MiB")
    return [Panel(title, x, y, found) for y, found in zip(names, lines, strict=True) if found]


def _lines(
    rows: Sequence[dict[str, Any]], field: str, measured: str, factor: float
) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for row in rows:
        # nothing is not a point on a logarithmic axis
        if row.get(measured):
            found.setdefault(row["baseline"], []).append((row[field], row[measured] * factor))
    return {name: points for name, points in found.items() if len(points) > 1}


Figures = list[tuple[str, list[Panel]]]


def _none(record: Record) -> Figures:
    return []


def _of_losses(record: Record) -> Figures:
    """Against n at each width, and against the width at the greatest n."""
    figures: Figures = []
    for operator in dict.fromkeys(row["operator"] for row in record.rows):
        rows = [row for row in record.rows if row["operator"] == operator]
        for width in sorted({row["width"] for row in rows}):
            at = [row for row in rows if row["width"] == width]
            figures.append(
                (f"{operator}-{width}", _two(at, "n", "rows n", f"{operator}, D = {width}"))
            )
        n = max(row["n"] for row in rows)
        at = [row for row in rows if row["n"] == n]
        figures.append((f"{operator}-widths", _two(at, "width", "D", f"{operator}, n = {n:,}")))
    return figures


def _of_memory(record: Record) -> Figures:
    figures: Figures = []
    for operator in dict.fromkeys(row["operator"] for row in record.rows):
        for width in sorted({row["width"] for row in record.rows}):
            at = [r for r in record.rows if (r["operator"], r["width"]) == (operator, width)]
            panels = [
                Panel(f"{operator}, D = {width}", "rows n", f"{name} MiB", lines)
                for name in ("saved", "peak")
                if (lines := _lines(at, "n", f"{name}_bytes", 2**-20))
            ]
            figures.append((f"{operator}-{width}", panels))
    return figures


def _of_collectives(record: Record) -> Figures:
    figures: Figures = []
    for operator in dict.fromkeys(row["operator"] for row in record.rows):
        for n in sorted({row["n"] for row in record.rows}):
            at = [r for r in record.rows if (r["operator"], r["n"]) == (operator, n)]
            panels = [
                Panel(f"{operator}, {n:,} pairs each", "ranks", y, lines)
                for y, field, factor in (
                    ("MiB received", "received_bytes", 2**-20),
                    ("ms", "p50", 1e3),
                )
                if (lines := _lines(at, "ranks", field, factor))
            ]
            figures.append((f"{operator}-{n}", panels))
    return figures


_FIGURES: dict[str, Callable[[Record], Figures]] = {
    "losses": _of_losses,
    "memory": _of_memory,
    "collectives": _of_collectives,
}
