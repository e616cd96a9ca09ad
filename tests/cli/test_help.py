"""`--help` of every command: broken into lines once, by the terminal's width."""

import re
from dataclasses import dataclass, field
from typing import get_args

import pytest

from fastclip.cli import COMMANDS, bench, convert, eval, main, study
from fastclip.command_line import parse_flags
from fastclip.data.options import DataOptions

PARTS = {"bench": bench.Config, "convert": convert.ConvertConfig, "eval": eval.Command}
PARTS["study"] = study.Study


def subcommands(command: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The command alone, and with each of its parts, whose names its own help lists."""
    text = shown([command], capsys)
    found = re.search(r"\{([^}]*)\}", " ".join(text.split())) if command in PARTS else None
    names = re.split(r"[, ]+", found[1]) if found else []
    assert len(names) == len(get_args(PARTS.get(command))), names
    return [[command], *([command, name] for name in names)]


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
def test_it_is_broken_once(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command and each of its parts has help, of the width of the terminal.

    A line is broken only where the next word would not fit.
    """
    monkeypatch.setenv("COLUMNS", "100")
    for words in subcommands(command, capsys):
        for width in (50, 80, 100):
            monkeypatch.setenv("COLUMNS", str(width))
            text = shown(words, capsys)
            assert text.startswith(f"usage: fastclip {' '.join(words)} ")
            lines = text.splitlines()
            # without a terminal boxes have no sides
            texts = [line.startswith("      ") and not line.isspace() for line in lines]
            for number in range(1, len(lines)):
                if texts[number - 1] and texts[number]:
                    # a default is a tab
                    word = lines[number].replace("\t", "\\t").split()[0]
                    before = lines[number - 1].rstrip()
                    assert len(before) + 1 + len(word) > width - 2, (words, width, before)
            for line in lines:
                # names that are listed without spaces stay whole
                assert len(line) <= width or "{" in line, line


@dataclass(frozen=True)
class Flags:
    """One sentence that is broken in the source
    3 times, and
    again.

    Another paragraph.
    """

    name: str = "a"
    """What begins with a digit or sign on the second line,
    --name or
    "quoted", is one line all the same."""
    options: DataOptions = field(default_factory=DataOptions)


def test_strings_and_docstrings_are_made_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--help"], "flags")
    text = capsys.readouterr().out
    assert "\nOne sentence that is broken in the source 3 times, and again.\n\nAnother par" in text
    assert 'on the second line, --name or "quoted", is one line all the same. (def' in text
    # the string under a field wins over the docstring of its class
    assert "the least recently used shards are deleted." in text


def test_other_output_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--tyro-print-completion", "bash"], "flags")
    monkeypatch.setenv("COLUMNS", "400")
    narrow = capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--tyro-print-completion", "bash"], "flags")
    assert narrow == capsys.readouterr().out and max(map(len, narrow.splitlines())) > 60
