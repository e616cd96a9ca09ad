"""Bytes that losses exchange over real processes are what the formulas say."""

import json
from pathlib import Path

import pytest

from fastclip.bench import collectives
from fastclip.bench.collectives import CollectiveSettings
from fastclip.cli import main

N, WIDTH = 24, 16


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_bytes_scale_with_ranks(world: int) -> None:
    """In float32: texts travel there, their gradients back, and what a column's sums need."""
    settings = CollectiveSettings(rounds=1, warmup=0)
    rows = collectives.measure(("clip", "siglip"), world, (N,), WIDTH, settings)
    received = {(row.operator, row.baseline): row.received_bytes or 0 for row in rows}
    others = world - 1
    texts = others * N * WIDTH * 4
    for row in rows:
        assert row.status == "ok" and row.error is not None and row.error < 1e-6
        assert row.p20 is not None and row.saved_bytes is not None
        at_least = 2 * texts
        assert row.received_bytes is not None and row.received_bytes >= at_least, row
    sums = 16 * others * N
    assert received["clip", "fastclip gather"] <= 2 * texts + sums + 64 * world
    # the ring carries the texts twice, forward and backward, and their gradients once
    assert received["clip", "fastclip ring"] <= 3 * texts + sums + 64 * world
    for exchange in ("gather", "ring"):
        assert received["siglip", f"fastclip {exchange}"] <= 2 * texts + 64 * world
    # open_clip's images travel too; nothing of it is counted twice
    for mode in ("local", "global"):
        assert received["clip", f"open_clip {mode}"] == 4 * texts
    for exchange in ("bidir", "shift", "gather"):
        assert received["siglip", f"open_clip {exchange}"] == 2 * texts


@pytest.mark.dist
def test_rows_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "collectives.json"
    flags = f"--loss clip --ranks 2 --n {N} --width {WIDTH} --rounds 2 --device cpu"
    assert main(["bench", "collectives", *flags.split(), "--output", str(file)]) == 0
    assert "open_clip local" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["benchmark"] == "collectives"
    rows = {row["baseline"]: row for row in content["results"]}
    assert rows["fastclip gather"]["ratio"] == 1
    # on one chip's memory, the ring keeps a rank's own rows alone
    assert rows["fastclip ring"]["saved_bytes"] < rows["fastclip gather"]["saved_bytes"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [("--ranks 1", "give 2 or more"), ("--ranks 2 --n 0", "must be positive")],
)
def test_what_cannot_be(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "collectives", *flags.split(), "--device", "cpu"]) == 1
    assert says in capsys.readouterr().err
