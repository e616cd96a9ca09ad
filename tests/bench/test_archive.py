"""A session's archive is put where it belongs, whole or not at all."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.bench import records
from fastclip.bench.archive import main
from fastclip.bench.gpu_lab import pack
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Settings, measure
from fastclip.kernels.attention_plans import PLANS_FILE
from fastclip.kernels.launch import TILINGS_FILE

ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00", "device": "NVIDIA H200", "invented": True}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("benchmarks/results", "benchmarks/notes", "kernels"):
        (root / folder).mkdir(parents=True)
    return root


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """What a losses stage leaves, the times being this machine's."""
    output = tmp_path / "lab"
    output.mkdir()
    settings = Settings(rounds=1, compiled=False)
    rows = measure(OPERATORS["clip"], 64, 16, settings)
    records.write(output / "losses.json", "losses", settings, rows, "cpu", clocks=["1980 MHz"])
    (output / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (output / "stage.json").write_text(json.dumps({"losses": {"ceilings": "ok", "losses": "ok"}}))
    (output / "ceilings.json").write_text(json.dumps({"product": 1.5, "copy": 2.5, "chunks": []}))
    (output / "tilings.json").write_text(TILINGS_FILE.read_text())
    (output / "attention_plans.json").write_text(PLANS_FILE.read_text())
    records.write(output / "small.json", "losses", settings, rows, "cpu")
    row = {"tiling": [128, 256, 64, 8, 3], "status": "ok", "seconds": 0.00125}
    late = {"tiling": [1], "status": "out of time"}
    (output / "sweep.json").write_text(json.dumps({"gradient": {"16bit": [row, late]}}))
    findings = [{"loss": "clip", "ok": True}, {"loss": "siglip", "ok": False}]
    (output / "check-triton.json").write_text(json.dumps(findings))
    (output / "profile.txt").write_text("a profile")
    (output / "losses.log").write_text("a log")
    return output


def test_results_tables_and_a_note(
    lab: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(pack(lab)), "--root", str(checkout)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    result = checkout / "benchmarks/results/2026-01-02-h200-losses.json"
    assert records.read(result).benchmark == "losses"
    note = (checkout / "benchmarks/notes/2026-01-02-h200-losses.md").read_text()
    assert "- ceilings: ok" in note and "product 1.50" in note and "clip" in note
    assert "Check of triton: 2 cases against float64, 1 wrong.\n- wrong: " in note
    assert "- gradient, 16bit: [128, 256, 64, 8, 3] 1.250\n" in note
    small = checkout / "benchmarks/results/2026-01-02-h200-small.json"
    assert records.read(small).benchmark == "losses"
    assert (checkout / "benchmarks/notes/2026-01-02-h200-profile.txt").read_text() == "a profile"
    assert (checkout / "kernels/tilings.json").read_text() == TILINGS_FILE.read_text()
    assert (checkout / "kernels/attention_plans.json").read_text() == PLANS_FILE.read_text()


def test_earlier_results_are_kept(lab: Path, checkout: Path, logged: Callable[[], str]) -> None:
    kept = checkout / "benchmarks/results/2026-01-02-h200-losses.json"
    kept.write_text("earlier")
    assert main([str(pack(lab)), "--root", str(checkout)]) == 1
    assert "exists" in logged() and kept.read_text() == "earlier"
    assert not list((checkout / "kernels").iterdir())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("losses.json", '{"results": []}'),
        ("tilings.json", '{"tilings": {"sm_90": {"gradient": {"16bit": [1]}}}}'),
        ("attention_plans.json", '{"plans": {"sm_90": {"sideways": {"a": [1]}}}}'),
        ("environment.json", "[]"),
        ("stage.json", "{"),
        ("sweep.json", '{"gradient": [1]}'),
        ("check-triton.json", '[{"loss": "clip"}]'),
    ],
)
def test_a_damaged_file_leaves_nothing_behind(
    name: str, text: str, lab: Path, checkout: Path, logged: Callable[[], str]
) -> None:
    (lab / name).write_text(text)
    assert main([str(pack(lab)), "--root", str(checkout)]) == 1
    assert name.removesuffix(".json") in logged()
    assert not [path for path in checkout.rglob("*") if path.is_file()]


def _add(archive: Path, member: tarfile.TarInfo) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member, io.BytesIO(b"x" * member.size))


def test_other_archives_are_refused(
    tmp_path: Path, checkout: Path, logged: Callable[[], str]
) -> None:
    archive = tmp_path / "lab.tar.gz"
    for name, kind in (("../evil.json", tarfile.REGTYPE), ("evil.json", tarfile.SYMTYPE)):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
        _add(archive, member)
        assert main([str(archive), "--root", str(checkout)]) == 1
        assert "never packs" in logged()
    archive.write_text("no archive")
    assert main([str(archive), "--root", str(checkout)]) == 1
    assert "is not an archive of" in logged()
