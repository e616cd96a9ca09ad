"""A session on a GPU, rehearsed without one: parts that end well, crash, hang or are wrong."""

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fastclip.bench import gpu_lab
from fastclip.bench.gpu_lab import PARTS, STAGES, Part, run_stage

WELL = "pass"


def commands(**codes: str):
    """Processes that write a file of invented figures and then do what the code says."""

    def command(part: Part, output: Path, seconds: float, quick: bool) -> list[str]:
        file = output / f"{part.name}.json"
        code = f"import os, sys, time; open({str(file)!r}, 'w').write('{{\"invented\": true}}')"
        return [sys.executable, "-c", f"{code}; {codes.get(part.name, WELL)}"]

    return command


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage(stage: str, tmp_path: Path) -> None:
    statuses = run_stage(stage, tmp_path, 60.0, command=commands())
    assert statuses == {part.name: "ok" for part in STAGES[stage]}
    with tarfile.open(tmp_path / "lab.tar.gz") as tar:
        names = set(tar.getnames())
    for name in statuses:
        assert {f"{name}.json", f"{name}.log"} <= names
    assert json.loads((tmp_path / "stage.json").read_text()) == {stage: statuses}


def test_what_was_found_is_packed_after_every_part(tmp_path: Path) -> None:
    """Whoever ends the session loses one part."""
    archive, output = tmp_path / "back.tar.gz", tmp_path / "lab"
    output.mkdir()
    looks = f"import tarfile; assert 'ceilings.json' in tarfile.open({str(archive)!r}).getnames()"
    statuses = run_stage("losses", output, 60.0, command=commands(tilings=looks), archive=archive)
    assert statuses["tilings"] == "ok" and not (output / "lab.tar.gz").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_part_that_fails_costs_no_other(tmp_path: Path) -> None:
    codes = {"ceilings": "os.abort()", "tilings": "1 / 0", "check": "sys.exit(1)"}
    statuses = run_stage("losses", tmp_path, 60.0, command=commands(**codes))
    assert statuses["ceilings"] == "failed (-6)" and statuses["tilings"] == "failed (1)"
    assert statuses["check"] == "wrong"
    assert statuses["profile"] == statuses["losses"] == "ok"
    assert "ZeroDivisionError" in (tmp_path / "tilings.log").read_text()


def test_a_part_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [Part("ceilings", 2.0), Part("tilings", 20.0)]
    monkeypatch.setitem(gpu_lab.STAGES, "losses", parts)
    beat = tmp_path / "beat"
    child = f"while True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.1)"
    hang = f"import subprocess; subprocess.Popen([sys.executable, '-c', {'import time' + chr(10) + child!r}]); time.sleep(600)"  # noqa: E501
    statuses = run_stage("losses", tmp_path, 60.0, command=commands(ceilings=hang))
    assert statuses == {"ceilings": "ran out of time", "tilings": "ok"}
    # what it found before is kept
    assert json.loads((tmp_path / "ceilings.json").read_text()) == {"invented": True}
    size = beat.stat().st_size
    time.sleep(0.5)
    assert size > 0 and beat.stat().st_size == size


def test_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lab, "CLOSING", 1.0)
    began = time.monotonic()
    slow = {part.name: "time.sleep(600)" for part in STAGES["losses"]}
    statuses = run_stage("losses", tmp_path, 5.0, command=commands(**slow))
    assert time.monotonic() - began < 6.0
    assert statuses["ceilings"] == "ran out of time" and statuses["losses"] == "left out"
    assert (tmp_path / "lab.tar.gz").exists()


def test_the_parts_before_the_last_leave_it_time() -> None:
    for parts in STAGES.values():
        before = sum(part.seconds for part in parts[:-1])
        assert gpu_lab.BUDGET - gpu_lab.CLOSING - before >= 120
        assert all(part.name in PARTS for part in parts)
