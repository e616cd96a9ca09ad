"""What commands print fits 80 columns: help and results, so that no row is broken by a terminal."""

import ast
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from fastclip.cli import COMMANDS, main
from fastclip.messages import counted
from tests.cli.test_help import shown, subcommands
from tests.test_repo_shape import tracked

WIDTH = 80


def long_lines(text: str, *paths: Path) -> list[str]:
    """Lines that a terminal would break, but for those with a path, which is as long as it is."""
    lines = [line for line in text.splitlines() if len(line) > WIDTH]
    return [line for line in lines if not any(str(path) in line for path in paths)]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    if command == "info":
        assert main(["info", "--help"]) == 0
        texts = [capsys.readouterr().out]
    else:
        texts = [shown(words, capsys) for words in subcommands(command, capsys)]
    for text in texts:
        # lists of names without spaces stay whole
        assert [line for line in long_lines(text) if "{" not in line] == []


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
        ["eval", "list"],
        "plan --gpus 8 --batch 65536 --engine zero2 --model ViT-mini-16px".split(),
        "plan --gpus 1024 --batch 4194304 --dist ring --model ViT-mini-16px".split(),
    ):
        assert main(words) == 0
    assert long_lines(capsys.readouterr().out) == []


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
