"""`fastclip bench all` runs the parts in turn, and reports what they wrote."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastclip.bench.runner import CannotRunHere
from fastclip.cli import main
from fastclip.cli.bench import everything
from fastclip.cli.bench.operators import AttentionConfig, MemoryConfig


@dataclass(frozen=True)
class Needy:
    """A part whose package is not there."""

    quick: bool
    device: str
    output: Path

    def run(self) -> int:
        """Fail as an import does."""
        raise ModuleNotFoundError("No module named 'absent'", name="absent")


@dataclass(frozen=True)
class Broken(Needy):
    """A part that fails on its way."""

    def run(self) -> int:
        """Fail as a process that dies does."""
        raise RuntimeError("process 1 terminated")


@dataclass(frozen=True)
class Wrong(Needy):
    """A part whose operator has a fault."""

    def run(self) -> int:
        """Fail as a check of shapes does."""
        raise ValueError("process 1 terminated")


@dataclass(frozen=True)
class Elsewhere(Needy):
    """A part that this machine is too small for."""

    def run(self) -> int:
        """Say so."""
        raise CannotRunHere("--ranks 8 with 1 GPUs")


def test_a_part_that_cannot_run_here_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "PARTS", {"losses": Elsewhere, "attention": AttentionConfig})
    assert main(["bench", "all", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "left out: --ranks 8 with 1 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("part", [Broken, Wrong])
def test_a_part_that_fails_costs_no_other(
    part: type[Needy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(everything, "PARTS", {"losses": part, "attention": AttentionConfig})
    flags = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["bench", "all", *flags]) == 1
    message = capsys.readouterr()
    assert "losses failed" in message.out and "process 1 terminated" in message.err
    assert "## Attention" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_parts_run_in_turn_and_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"attention": AttentionConfig, "train-step": Needy, "memory": MemoryConfig}
    monkeypatch.setattr(everything, "PARTS", parts)
    stale = tmp_path / "train-step.json"
    stale.write_text("{}")
    flags = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["bench", "all", *flags]) == 0
    message = capsys.readouterr().out
    assert "left out: it needs the package 'absent'" in message
    # an earlier run's result is neither lost nor reported as this one's
    assert stale.read_text() == "{}"
    assert message.index("== attention") < message.index("== memory") < message.index("== report")
    text = (tmp_path / "report.md").read_text()
    assert "## Attention" in text and "## Memory" in text and "## A whole" not in text
    # the quick sizes are three, so that there is a curve
    assert (tmp_path / "report-1-memory-clip-128.svg").is_file()


def test_losses_are_measured_where_there_is_no_triton() -> None:
    absent = "import sys; sys.modules['triton'] = None; "
    code = absent + "import fastclip.bench.memory, fastclip.bench.collectives"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_part_is_there_and_can_be_quick() -> None:
    wanted = {"losses", "attention", "data", "train-step", "memory", "collectives"}
    assert set(everything.PARTS) == wanted
    for part in everything.PARTS.values():
        config = part(quick=True, device="cpu", output=Path("x.json"))
        assert config.quick
