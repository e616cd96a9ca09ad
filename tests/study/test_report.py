"""What a study writes, of outcomes made by hand."""

import json
from pathlib import Path

from fastclip.study.report import table, write
from fastclip.study.runs import Outcome
from fastclip.study.verdict import Verdict

COLUMNS = {"accuracy": "zero-shot", "recall": "recall @5"}


def outcome(name: str, accuracy: float, recall: float | None = None) -> Outcome:
    scores = {"accuracy": accuracy} | ({} if recall is None else {"recall": recall})
    return Outcome(name, ("--lr", "1"), 90.0, 4.0, 1.5, scores, {"accuracy": 0.05})


ROWS = [
    ("ours", [outcome("a-0", 0.5, 0.25), outcome("a-1", 0.6, 0.35)]),
    ("theirs", [outcome("b-0", 0.125)]),
]


def test_a_row_is_mean_and_spread_of_its_runs() -> None:
    lines = table(ROWS, COLUMNS).splitlines()
    assert lines[0] == "|  | minutes | loss | zero-shot | recall @5 |"
    # sample standard deviation of 50 and 60
    assert lines[2] == "| ours | 1.5 | 4.00 → 1.50 | 55.0% ± 7.1 | 30.0% ± 7.1 |"
    assert lines[3] == "| theirs | 1.5 | 4.00 → 1.50 | 12.5% |  |"
    assert lines[4] == "| chance |  |  | 5.0% |  |"


def test_a_report_has_text_numbers_and_a_plot(tmp_path: Path) -> None:
    verdict = Verdict("ours is better", "undecided", "by 2 points")
    text = write(tmp_path, "Ours and theirs", ROWS, COLUMNS, ["Two seeds."], [verdict])
    assert (tmp_path / "report.md").read_text() == text
    assert text.startswith(
        "# Ours and theirs\n\n- **undecided**: ours is better (by 2 points)\n\n| "
    )
    assert text.endswith("Two seeds.\n")
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["rows"]["ours"][1]["scores"] == {"accuracy": 0.6, "recall": 0.35}
    assert values["verdicts"][0]["answer"] == "undecided"
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_the_line_of_a_run_has_its_scores_and_not_their_parts() -> None:
    """Of a classifier judged after every epoch there would be a hundred."""
    run = outcome("a-0", 0.5)
    run.scores.update({"fog": 0.25, "1/accuracy": 0.125})
    assert str(run) == "a-0: 90 s, accuracy 50.0%"
