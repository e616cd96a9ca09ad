"""Runs of studies that are forks."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import IO, Any

import pytest

from fastclip.study import runs
from tests.processes import start_command


@pytest.fixture
def forked_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command in a fork: of a tiny run the imports take longer than the steps."""

    def run(
        command: Sequence[str], stdout: IO[bytes], stderr: int, env: Mapping[str, str]
    ) -> SimpleNamespace:
        assert [*command[:4]] == [sys.executable, "-m", "fastclip.cli", "train"]
        assert stderr == subprocess.STDOUT
        process = start_command(*command[3:], environment=dict(env))
        stdout.write("".join(process.communicate(timeout=300)).encode())
        return SimpleNamespace(returncode=process.returncode)

    processes: Any = SimpleNamespace(run=run, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(runs, "subprocess", processes)
