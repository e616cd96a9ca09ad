"""What a study writes: a table for the eye, the numbers as JSON, and a plot."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text, writing
from fastclip.study.runs import Outcome
from fastclip.study.verdict import Verdict

Row = tuple[str, Sequence[Outcome]]


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table: a row's mean over its runs, with their spread where there are several.

    Args:
        rows: label and outcomes, one a seed.
        columns: scores by name, with their headings.
    """
    headings = ["", "minutes", "loss", *columns.values()]
    lines = [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    guess: dict[str, float] = {}
    for label, outcomes in rows:
        minutes = statistics.mean(o.seconds for o in outcomes) / 60
        first, last = (
            statistics.mean(getattr(o, name) for o in outcomes)
            for name in ("first_loss", "last_loss")
        )
        cells = [label, f"{minutes:.1f}", f"{first:.2f} → {last:.2f}"]
        for name in columns:
            cells.append(_spread([o.scores[name] for o in outcomes if name in o.scores]))
        lines.append(f"| {' | '.join(cells)} |")
        guess |= {name: value for o in outcomes for name, value in o.chance.items()}
    if guess:
        cells = [f"{guess[name]:.1%}" if name in guess else "" for name in columns]
        lines.append(f"| {' | '.join(['chance', '', '', *cells])} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) * 100:.1f}"


def write(
    folder: Path,
    title: str,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    notes: Sequence[str],
    verdicts: Sequence[Verdict] = (),
    beside: Mapping[str, Any] | None = None,
) -> str:
    """Write report.md, results.json and scores.png into the folder; returns the report.

    Args:
        folder: which there is already.
        title: of the report.
        rows: label and outcomes, one a seed.
        columns: scores by name, with their headings.
        notes: paragraphs under the table.
        verdicts: of the study's claims.
        beside: further entries of results.json.
    """
    said = "\n".join(f"- {verdict}" for verdict in verdicts)
    parts = [f"# {title}", said, table(rows, columns), *notes]
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_text(folder / "report.md", text)
    values = {
        **(beside or {}),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "rows": {label: [asdict(outcome) for outcome in outcomes] for label, outcomes in rows},
    }
    write_text(folder / "results.json", json.dumps(values, indent=1) + "\n")
    _plot(folder / "scores.png", rows, columns)
    return text


def _plot(path: Path, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """A panel a score: each run a dot, the mean a stroke, its label beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (2 + 2.6 * len(columns), 1.6 + 0.32 * len(rows))
    figure, panels = plt.subplots(1, len(columns), sharey=True, squeeze=False, figsize=size)
    for panel, (name, heading) in zip(panels[0], columns.items(), strict=True):
        for place, (_, outcomes) in enumerate(rows):
            scores = [100 * o.scores[name] for o in outcomes if name in o.scores]
            if scores:
                panel.plot(scores, [place] * len(scores), "o", color="tab:blue", alpha=0.5)
                panel.plot(statistics.mean(scores), place, "|", color="black", markersize=14)
        guess = [100 * o.chance[name] for _, own in rows for o in own if name in o.chance]
        if guess:
            panel.axvline(guess[0], color="tab:gray", linestyle="--", linewidth=1)
        panel.set_xlabel(f"{heading}, %")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(rows)), [label for label, _ in rows])
    panels[0][0].invert_yaxis()
    marks = [
        plt.Line2D([], [], marker="o", color="tab:blue", alpha=0.5, linestyle="none"),
        plt.Line2D([], [], marker="|", color="black", markersize=14, linestyle="none"),
        plt.Line2D([], [], color="tab:gray", linestyle="--", linewidth=1),
    ]
    names = ["one seed", "mean", "chance"]
    # under the panels, where it hides nothing
    figure.tight_layout(rect=(0, 0.35 / size[1], 1, 1))
    figure.legend(marks, names, loc="lower center", ncols=3, frameon=False)
    with writing(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)
