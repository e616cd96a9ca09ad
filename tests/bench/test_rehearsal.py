"""A session on a GPU, rehearsed without one: parts that end well, crash, hang or are wrong."""

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fastclip.bench import gpu_lab, lab_losses
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
    parts = [Part("ceilings", 4.0), Part("tilings", 20.0)]
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


def fake_sizes(output: Path, dies_at: dict[tuple[int, bool], int]):
    """Processes that invent a row a size, and end where they are meant to."""

    def command(first: int, seconds: float, alone: bool) -> list[str]:
        code = f"""
import json, sys
from pathlib import Path
output, first, alone = Path({str(output)!r}), {first}, {alone}
file = output / ("losses.json" if not (first or alone) else f"losses-{{first}}-{{alone}}.json")
rows = []
for size in range(first, first + 1 if alone else 4):
    (output / "losses-begun.txt").write_text(str(size))
    status = {dies_at!r}.get((size, alone))
    if status is not None:
        sys.exit(status)
    for name in ("fastclip",) if alone else ("fastclip", "open_clip"):
        rows.append({{"operator": "clip", "n": size, "width": 8, "baseline": name}})
    file.write_text(json.dumps({{"results": rows, "clocks": [size]}}))
"""
        return [sys.executable, "-c", code]

    return command


def rows_of(output: Path) -> list[tuple[int, str]]:
    rows = json.loads((output / "losses.json").read_text())["results"]
    return [(row["n"], row["baseline"]) for row in rows]


BOTH = ("fastclip", "open_clip")


def test_a_baseline_that_spoils_the_gpu_costs_its_size_the_baselines(tmp_path: Path) -> None:
    command = fake_sizes(tmp_path, {(1, False): lab_losses.SPOILED})
    assert lab_losses.measure(tmp_path, 60.0, False, command)
    assert rows_of(tmp_path)[:3] == [(0, "fastclip"), (0, "open_clip"), (1, "fastclip")]
    assert sorted(rows_of(tmp_path)[3:]) == [(n, name) for n in (2, 3) for name in BOTH]
    assert [file.name for file in tmp_path.glob("losses*.json")] == ["losses.json"]


def test_a_size_at_which_fastclip_itself_dies_is_left_out(tmp_path: Path) -> None:
    command = fake_sizes(tmp_path, {(0, False): -6, (0, True): -6})
    assert not lab_losses.measure(tmp_path, 60.0, False, command)
    assert sorted(rows_of(tmp_path)) == [(n, name) for n in (1, 2, 3) for name in BOTH]


def test_wrong_results_are_no_crash(tmp_path: Path) -> None:
    assert not lab_losses.measure(tmp_path, 60.0, True, fake_sizes(tmp_path, {(3, False): 1}))
    assert len(rows_of(tmp_path)) == 6


def test_a_stage_names_the_packages_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_lab.importlib.util.find_spec
    absent = ("yaml", "webdataset")
    monkeypatch.setattr(
        gpu_lab.importlib.util, "find_spec", lambda name: None if name in absent else found(name)
    )
    assert gpu_lab.lacking("data") == ["pyyaml", "webdataset"]
    assert gpu_lab.lacking("losses") == []
