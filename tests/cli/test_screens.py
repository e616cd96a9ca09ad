"""What commands print fits 80 columns, so that no terminal breaks a row; test_help.py has help."""

import ast
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest

from fastclip.cli import main
from fastclip.cli.study import QUESTIONS
from fastclip.messages import counted
from fastclip.screen import on_screen
from fastclip.study import collages, robustness, runs
from fastclip.study.runs import Outcome
from tests.cli.test_cli import run
from tests.conftest import jpeg, write_tar
from tests.test_repo_shape import tracked

__all__ = ["run"]  # fixtures

WIDTH = 80


def long_lines(text: str, *paths: Path) -> list[str]:
    """Lines that a terminal would break, but for those with a path, which is as long as it is."""
    lines = [line for line in text.splitlines() if len(line) > WIDTH]
    return [line for line in lines if not any(str(path) in line for path in paths)]


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert long_lines(capsys.readouterr().out) == []


def test_data_commands(
    make_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_shard(samples=3)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar at all" * 100)
    for words in (
        ["check-data", str(shard)],
        ["check-data", str(shard), str(broken)],
        ["data", "preview", str(shard), "--count", "3", "--output", str(tmp_path / "sheet.png")],
    ):
        main(words)
    captured = capsys.readouterr()
    assert "3 samples in 1 shard, 3 of them good" in captured.out
    assert long_lines(captured.out + captured.err, tmp_path, shard.parent) == []


def test_plan_info_and_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["info"],
        ["info", "--help"],
        ["eval", "list"],
        "plan --gpus 8 --batch 65536 --engine zero2 --model ViT-mini-16px".split(),
        "plan --gpus 1024 --batch 4194304 --dist ring --model ViT-mini-16px".split(),
    ):
        assert main(words) == 0
    assert long_lines(capsys.readouterr().out) == []


def test_evaluations_features_and_their_table(
    run: str, make_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--model", run, "--workers", "0", "--num-samples", "40"]
    shard, shifted = str(make_shard(samples=9)), str(make_shard("fog.tar", samples=9))
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "texts.txt").write_text("a red circle\n" * 3)
    for words in (
        ["eval", "zeroshot", *few],
        ["eval", "retrieval", *few],
        ["eval", "linear-probe", *few, "--train-data", "scenes:split=train"],
        ["eval", "robustness", *few, "--data", shard, "--shifts", f"fog={shifted}"],
        ["embed", "images", shard, *few, "-o", str(tmp_path / "images.npy")],
        ["embed", "texts", str(tmp_path / "texts.txt"), *few, "-o", str(tmp_path / "texts.npy")],
        ["eval", "table"],
    ):
        results = (Path(run) / "eval").glob("*.json") if "table" in words else ()
        assert main([*words, *map(str, results)]) == 0
        shown = capsys.readouterr()
        assert long_lines(shown.out, tmp_path) == []
        # a progress bar is as wide as its terminal
        said = [line for line in shown.err.splitlines() if "\r" not in line and "it/s" not in line]
        assert long_lines("\n".join(said), tmp_path, Path(run)) == [], words
    # the rows begin with a path: what is beside it has room
    rows = [line.partition(run)[2] for line in shown.out.splitlines() if run in line]
    assert len(rows) > 1 and max(map(len, rows)) <= WIDTH


@pytest.mark.parametrize("question", ["recipe", "captions", "uniclip", "robustness"])
def test_studies(
    question: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of scores between 0.3 and 0.7 that the names of runs and scores make up."""
    columns = QUESTIONS[question].columns
    last = robustness.LONGER if question == "robustness" else 0
    epochs = [f"{epoch}/" for epoch in range(1, last + 1)]
    names = [*columns, "shifted", *robustness.SHIFTS]

    def made(name: str, flags: tuple[str, ...], *_: object, **__: object) -> Outcome:
        scores = {
            score: 0.3 + 0.4 * (crc32(f"{name} {score}".encode()) % 1000) / 1000
            for prefix in ["", *epochs]
            for score in (prefix + each for each in names)
        }
        # what was not judged is in no table
        judged = {} if name.startswith("simclr-") else scores
        return Outcome(name, flags, 90.0, 4.0, 1.0, judged, dict.fromkeys(columns, 0.1))

    for module in (runs, collages):
        monkeypatch.setattr(module, "run", made)
    # a study copies photographs of it
    write_tar(tmp_path / "train-00000.tar", [("a.jpg", jpeg())])
    monkeypatch.setattr(robustness, "corrupt_shards", lambda *_: None)
    assert main(["study", question, str(tmp_path), "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n| chance |") == shown.count("\n| --- |") > 0
    assert long_lines(shown, tmp_path) == []
    # the file is whole
    written = (tmp_path / "report.md").read_text()
    assert written.count("\n| --- |") == 1 and " ".join(written.split("\n| ")[0].split()) in (
        " ".join(shown.split())
    )


def test_a_table_that_is_too_wide_becomes_several() -> None:
    table = (
        "| | one | two | three |\n| --- | --- | --- | --- |\n| a | 1 |  | 3 |\n| bb | 4 | 5 | 6 |"
    )
    assert on_screen(table, 40) == table
    assert on_screen(table, 20).split("\n\n") == [
        "| | one | two |\n| --- | --- | --- |\n| a | 1 |  |\n| bb | 4 | 5 |",
        "| | three |\n| --- | --- |\n| a | 3 |\n| bb | 6 |",
    ]
    # no narrower than a column beside the first
    assert len(on_screen(table, 1).split("\n\n")) == 3
    assert on_screen(f"# title\n\n- {'word ' * 30}\n\n{table}").splitlines()[3].startswith("  word")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (12345, "12,345 steps")]
)
def test_numbers_with_their_nouns(count: int, text: str) -> None:
    assert counted(count, "step") == text
    assert counted(count, "process", "processes").startswith(text.split()[0] + " process")
    assert (count == 1) == counted(count, "process", "processes").endswith("process")


def grouped_behind_flags(text: str) -> Iterator[str]:
    """Numbers with separators behind a flag, in Python's strings and in what they are made of."""
    for node in ast.walk(ast.parse(text)):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for before, value in pairwise(parts):
            if not (isinstance(before, ast.Constant) and isinstance(value, ast.FormattedValue)):
                continue
            code = ast.unparse(value.format_spec) if value.format_spec else ""
            grouped = "," in code or ast.unparse(value.value).startswith("counted(")
            if grouped and re.search(r"--[a-z][\w-]*[ =]$", str(before.value)):
                yield ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(GROUPED, node.value)


GROUPED = r"--[a-z][\w-]*[ =]\d+,\d{3}\b"


def test_numbers_behind_flags_can_be_pasted() -> None:
    assert list(grouped_behind_flags('f"--warmup {steps:,} of"')) != []
    assert list(grouped_behind_flags('f"--warmup {steps} of {all:,}"')) == []
    found = {
        str(path): list(grouped_behind_flags(path.read_text()))
        for pattern in ("fastclip/*.py", "benchmarks/*.py")
        for path in tracked(pattern)
    }
    assert {path: lines for path, lines in found.items() if lines} == {}
    for path in tracked("*.md"):
        assert re.findall(GROUPED, path.read_text()) == [], path
