"""Results of several models and data sets side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastclip.printable import printable

# what guessing scores, by metric
CHANCE = "chance"


def markdown_table(results: Sequence[Mapping[str, Any]], metrics: Sequence[str] = ()) -> str:
    """A Markdown table with a row for each model and a column for each data set and metric.

    Args:
        results: as `fastclip.evaluate.results.read_result` gives them; rows and columns come in
            their order.
        metrics: those to show, by their names or the last word of them; all by default.

    Raises:
        ValueError: two results have different values of the same, or none has such a metric.
    """
    rows: dict[str, dict[str, float]] = {}
    known: dict[str, None] = {}
    for result in results:
        model = f"{result['model']} {result['pretrained']}".strip()
        row = rows.setdefault(model, {})
        for metric, value in _numbers(result["metrics"]):
            known[metric] = None
            if metrics and metric not in metrics and metric.split()[-1] not in metrics:
                continue
            column = f"{result['dataset']} {metric}"
            # a score that was not computed is NaN, which is unequal to itself
            if repr(row.setdefault(column, value)) != repr(value):
                raise ValueError(
                    f"two results of {model} differ in {column}: {row[column]} and {value}; leave "
                    "one out"
                )
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        raise ValueError(
            f"no result has --metrics {' '.join(metrics)}; they have {', '.join(known)}"
        )
    lines = [["model", *columns], ["---", *("---:" for _ in columns)]]
    for model, row in rows.items():
        lines.append([model, *(_cell(row.get(column)) for column in columns)])
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    """On one line, without what a terminal would obey: results may come from elsewhere."""
    return printable(" ".join(text.split())).replace("|", "&#124;")


def _numbers(metrics: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """The scores among metrics, those of parts as "part metric"."""
    for name, value in metrics.items():
        if name == CHANCE:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{place}{name} ")
        elif isinstance(value, int | float):
            yield place + name, value


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    # counts may be written as floats
    return f"{value:.0f}" if value > 1 and value == int(value) else f"{value:.4f}"
