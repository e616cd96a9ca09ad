"""The script of the pages' figures: every part of it is a command that parses."""

import os
import shlex
import stat
import subprocess
from pathlib import Path

from fastclip.cli.bench import Config
from fastclip.command_line import parse_flags
from tests.docs.pages import ROOT

SCRIPT = ROOT / "benchmarks" / "page_figures.sh"


def test_its_commands_parse(tmp_path: Path) -> None:
    """A stand-in for Python writes what it is called with."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PYTHON": str(python)}
    subprocess.run([SCRIPT, tmp_path / "out", "--quick"], env=environment, check=True)
    files = []
    for line in log.read_text().splitlines():
        module, *words = shlex.split(line)[1:]
        assert module == "fastclip.cli" and words[0] == "bench"
        config = parse_flags(Config, words[1:], "fastclip bench")
        assert config.quick
        files.append(config.output)
    assert len(set(files)) == len(files) >= 9
    assert all(file.parent == tmp_path / "out" for file in files)


def test_it_says_how_it_is_called() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "page_figures.sh DIR [--quick]" in done.stdout
