"""The script of the pages' figures: every part of it is a command that parses."""

import importlib
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Settings, measure
from fastclip.bench.variants import VARIANTS, with_variants
from fastclip.cli.bench import Config
from fastclip.command_line import parse_flags
from tests.docs.pages import ROOT

SCRIPT = ROOT / "benchmarks" / "page_figures.sh"


def test_its_commands_parse(tmp_path: Path) -> None:
    """A stand-in for Python writes what it is called with."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PYTHON": str(python), "SHARDS": "a.tar", "CIFAR10": "cifar"}
    subprocess.run([SCRIPT, tmp_path / "out", "--quick"], env=environment, check=True)
    files, modules = [], []
    for line in log.read_text().splitlines():
        module, *words = shlex.split(line)[1:]
        assert "--quick" in words
        files.append(Path(words[words.index("--output") + 1]))
        if module == "fastclip.cli":
            assert words[0] == "bench"
            assert parse_flags(Config, words[1:], "fastclip bench").output == files[-1]
        else:
            main = importlib.import_module(module).main
            with pytest.raises(SystemExit, match="0"):
                main([*words, "--help"])
            modules.append(module)
    assert len(set(files)) == len(files) >= 9
    assert set(modules) == {"fastclip.bench.variants", "fastclip.bench.ranking"}
    assert all(file.parent == tmp_path / "out" for file in files)


def test_it_says_how_it_is_called() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "page_figures.sh DIR [--quick]" in done.stdout


def test_variants_are_interleaved_with_the_baselines() -> None:
    """And none is another loss."""
    operator = with_variants(OPERATORS["clip"])
    rows = measure(operator, 64, 16, Settings(rounds=1, compiled=False))
    names = [row.baseline for row in rows]
    assert names[:4] == ["fastclip", *(f"fastclip, {name}" for name in VARIANTS)]
    assert "open_clip" in names
    assert all(row.status == "ok" and row.error < 2e-6 for row in rows[:4])
