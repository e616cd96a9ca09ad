"""What `fastclip bench` prints fits 80 columns, says its units, and survives an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastclip.bench import kinds, records, screen
from fastclip.bench.runner import MATMUL, Row, Settings
from fastclip.cli import main
from fastclip.messages import counted
from tests.test_repo_shape import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FILES = {
    path.name: path
    for path in sorted(RESULTS.glob("*.json"))
    if {"environment", "results"} <= json.loads(path.read_text()).keys()
    and "study" not in path.name
}
LARGE = Row(
    "mp_nce", "linear_cross_entropy twice", 262_144, 1024, "ok", 123.456, 99.0, 123.456, 130
)


def test_results_of_all_kinds_are_committed() -> None:
    """But for attention, which has been measured on no GPU."""
    found = {records.read(path).benchmark for path in FILES.values()}
    assert found == set(kinds.KINDS) - {"attention"}


@pytest.mark.parametrize("name", FILES)
def test_reports_and_comparisons_fit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(FILES[name])
    assert main(["bench", "report", file]) == 0
    assert main(["bench", "compare", file, file]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= screen.WIDTH, line


def test_the_largest_numbers_fit_and_ratios_have_one_direction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    peak = {"peak_bytes": 139 << 30, "error": 1.1e-7, "matmul_share": 0.5}
    large = replace(LARGE, **peak, repeatable=False)
    ours = replace(large, baseline="fastclip", p50=61.728, p20=60.0, p80=63.0, repeatable=True)
    status = "failed: RuntimeError: " + "x" * 300
    with screen.Rows("losses", Settings(), "cpu", None) as rows:
        rows.add([ours, large, replace(large, baseline="liger", status=status, p50=None)])
        rows.add([replace(ours, n=524_288, status=status, p50=None)])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    # a word that is longer than the screen is nobody's fault
    assert all(len(line) <= screen.WIDTH for line in lines if "xxx" not in line)
    heads = [line.split() for line in lines[:2]]
    assert heads[0] == ["forward", "fwd+bwd", "±", "fastclip", "matmul", "peak", "dX"]
    assert heads[1] == ["ms", "ms", "%", "×", "faster", "share", "MiB", "error"]
    (line,) = [line for line in lines if line.startswith("  linear_cross_entropy")]
    words = line.split()[2:]
    # 123 s beside 62 s, and half of 31 s around it
    assert words == ["123,000", "123,000", "13", "2.00", "50%", "142,000", "1.1e-07"]
    assert "\nDid not run: liger (failed: RuntimeError:" in printed
    # fastclip's own failure stands in its place
    assert "n = 524,288 D = 1,024\n  fastclip" in printed
    assert "vary from call to call: linear_cross_entropy twice." in printed


def test_a_baseline_that_ran_elsewhere_is_said_with_its_place() -> None:
    ours = replace(LARGE, baseline="fastclip")
    small = replace(LARGE, n=8, baseline="open_clip")
    rows = [replace(ours, n=8), small, ours]
    rows += [
        replace(LARGE, baseline=name, status="too big", p50=None) for name in ("open_clip", "x")
    ]
    (said,) = screen.closing(screen.grouped("losses", Settings(), rows))
    assert " ".join(said.split()) == (
        "Did not run: open_clip at mp_nce n = 262,144 D = 1,024, x (too big)."
    )


def test_a_share_that_cannot_be_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "busy.json"
    bare = replace(LARGE, baseline=MATMUL, matmul_share=1.0)
    with screen.Rows("losses", Settings(), "cpu", file) as rows:
        rows.add([replace(LARGE, baseline="fastclip", matmul_share=146.13), LARGE, bare])
    record = records.read(file)
    # the file has what was measured
    assert record.rows[0]["matmul_share"] == 146.13
    (group,) = kinds.KINDS["losses"].groups(record)
    assert group.doubtful
    line_of_ours = screen.lines(group)[1]
    text = "\n".join([*screen.lines(group), *screen.closing([group])])
    assert "14613" not in text and line_of_ours.endswith("  ?") and "100%" in text
    assert "the machine was busy" in text
    # hardware may have products of 16 bits many times as fast as of 32
    assert kinds.most_share({"dtype": "torch.bfloat16"}) > 10 > kinds.most_share({})


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (1000.0, True), (None, False)])
def test_a_busy_machine_is_said(
    load: float | None,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(screen, "load_average", lambda: load)
    file = tmp_path / "x.json"
    with screen.Rows("losses", Settings(), "cpu", file) as rows:
        rows.add([LARGE])
    assert ("the machine is busy" in caplog.text) == said
    record = records.read(file)
    assert record.environment["load_average"] == load
    assert main(["bench", "report", str(file)]) == 0
    assert ("load average 1000.0 at" in " ".join(capsys.readouterr().out.split())) == said


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    """Ctrl-C while the second size is measured, which would take hours."""
    file = tmp_path / "out" / "losses.json"
    flags = f"--loss clip --n 64 65536 --width 16 --rounds 3 --no-compiled --output {file}"
    command = [sys.executable, "-m", "fastclip.cli", "bench", "losses", *flags.split()]
    # a shell's background process ignores Ctrl-C, and so would what this test starts
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        stop = time.monotonic() + 120
        while not file.exists() and process.poll() is None and time.monotonic() < stop:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, err
    rows = json.loads(file.read_text())["results"]
    assert {row["n"] for row in rows} == {64} and rows[0]["p50"] > 0
    ran = sum(row["status"] == "ok" for row in rows)
    assert "clip n = 64 D = 16" in out and "Did not run: " in out
    assert f"cut short; {file} has the {counted(ran, 'row')} that" in err and "Traceback" not in err
    assert main(["bench", "report", str(file)]) == 0
