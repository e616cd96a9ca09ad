"""Results are read as they were written, old files too; anything else is reported in a sentence."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastclip.bench import records
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Settings, measure
from fastclip.cli import main
from tests.test_repo_shape import ROOT

COMMITTED = sorted(
    path
    for kind in ("losses", "clip", "native", "loading")
    for path in (ROOT / "benchmarks" / "results").glob(f"*-{kind}.json")
)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read(path: Path) -> None:
    record = records.read(path)
    assert record.benchmark == ("data" if "loading" in path.name else "losses")
    assert record.environment["device"] and len({record.key(r) for r in record.rows}) > 1
    assert main(["bench", "report", str(path)]) == 0


def test_what_is_written_is_read(tmp_path: Path) -> None:
    settings = Settings(rounds=1, compiled=False)
    rows = measure(OPERATORS["clip"], 64, 16, settings)
    file = tmp_path / "a" / "losses.json"
    records.write(file, "losses", settings, rows, "cpu", note="more")
    record = records.read(file)
    assert record.settings["dtype"] == "torch.float32" and record.benchmark == "losses"
    assert [row["baseline"] for row in record.rows] == [row.baseline for row in rows]
    assert json.loads(file.read_text())["note"] == "more"


def test_the_first_files_names() -> None:
    """They knew one loss, called a baseline `name` and took open_clip as the unit."""
    record = records.read(ROOT / "benchmarks" / "results" / "2026-11-22-cpu-losses.json")
    assert {row["baseline"] for row in record.rows} == {"fastclip", "bare products", "open_clip"}
    assert all("ratio" not in row and row["operator"] == "clip" for row in record.rows)


@dataclass
class Wrong:
    """A file's text and what is said of it."""

    text: str
    says: str


HEAD = '{"benchmark": "losses", "environment": {"device": "x", "date": "y"}, "results":'


def one_row(**change: object) -> str:
    """A file of one row that is right but for what is changed."""
    row = {"operator": "clip", "n": 4, "width": 4, "baseline": "x", "p50": 1.0} | change
    return f"{HEAD} [{json.dumps(row)}]}}"


WRONG = {
    "cut": Wrong('{"environment": {', "not valid JSON"),
    "a list": Wrong("[1]", "holds a list"),
    "without environment": Wrong('{"results": []}', "no 'environment'"),
    "without rows": Wrong('{"environment": {}, "results": []}', "not rows"),
    "rows of numbers": Wrong('{"environment": {}, "results": [1]}', "not rows"),
    "a study's": Wrong(
        '{"environment": {"device": "x", "date": "y"}, "results": [{"seed": 1}]}',
        "no benchmark known here",
    ),
    "no device": Wrong(
        '{"environment": {}, "results": [{"operator": "clip"}]}', "environment has no 'device'"
    ),
    "a row cut": Wrong(f'{HEAD} [{{"operator": "clip", "n": 4}}]}}', "row 0 has no 'width'"),
    "words for numbers": Wrong(one_row(p50="fast"), "'p50' of row 0 is 'fast', not a number"),
    "a list in a row": Wrong(one_row(p50=[1]), "'p50' of row 0 is [1], not a number"),
    "a number for a name": Wrong(one_row(baseline=3), "'baseline' of row 0 is 3, not text"),
    "a word for a flag": Wrong(one_row(repeatable="yes"), "is 'yes', not true or false"),
    "no size": Wrong(one_row(n=None), "row 0 has no 'n'"),
    "a list for the benchmark": Wrong(
        '{"benchmark": [], "environment": {}, "results": [{"seed": 1}]}', "no benchmark known here"
    ),
    "settings of numbers": Wrong(one_row()[:-1] + ', "settings": [1]}', "not an object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_foreign_files_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_text(WRONG[case].text)
    assert main(["bench", "report", str(file), "-o", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert str(file) in message and WRONG[case].says in message
    assert not (tmp_path / "out").exists()


def test_bytes_and_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert main(["bench", "report", str(file)]) == 1
    assert "is not a text" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    assert main(["bench", "report"]) == 1
    assert "no files" in capsys.readouterr().err


PARTS = ("losses", "attention", "memory", "collectives", "train-step", "data")


@pytest.mark.parametrize("part", PARTS)
def test_a_place_that_cannot_be_written_is_reported_before_anything_is_measured(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--output", str(tmp_path)]
    assert main(["bench", part, *flags]) == 1
    message = capsys.readouterr()
    assert "is a folder" in message.err and not message.out
