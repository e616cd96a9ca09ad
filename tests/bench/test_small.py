"""The size up to which S is held whole, as it was measured."""

from pathlib import Path

import pytest

from fastclip.bench import records, small
from fastclip.bench.losses import OPERATORS
from fastclip.ops import dense
from tests.test_repo_shape import ROOT


def rows(times: dict[int, tuple[float | None, float | None]], name: str = "clip") -> list[dict]:
    return [
        {"operator": name, "n": n, "baseline": way, "p50": seconds}
        for n, both in times.items()
        for way, seconds in zip(small.WAYS, both, strict=True)
    ]


def test_limits_of_measured_rows() -> None:
    """The last size before the first that is slower, even if a larger one is not."""
    found = small.limits(
        [
            *rows({16: (1.0, 2.0), 64: (1.04, 1.0), 256: (1.2, 1.0), 512: (1.0, 2.0)}),
            *rows({16: (2.0, 1.0)}, "siglip"),
            *rows({16: (1.0, 1.0), 64: (None, 1.0)}, "sup_con"),
        ]
    )
    assert found == {"clip": 64**2, "siglip": 0, "sup_con": 16**2}


def test_both_ways_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its own way, whatever the limits are."""
    made: list[bool] = []
    original = dense.pairs_loss

    def pairs_loss(*arguments, **options):
        found = original(*arguments, **options)
        made.append(found is not None)
        return found

    monkeypatch.setattr(dense, "pairs_loss", pairs_loss)
    monkeypatch.setitem(dense.ENTRIES, ("cpu", "clip"), 0)
    monkeypatch.setattr(small, "OPERATORS", {"clip": OPERATORS["clip"]})
    monkeypatch.setattr(small, "MORE_ROUNDS", 1)
    before = dict(dense.ENTRIES)
    file = tmp_path / "small.json"
    small.main(["--output", str(file), "--sizes", "8", "--rounds", "2"])
    assert made.count(True) == made.count(False) > 0
    assert dense.ENTRIES == before
    record = records.read(file)
    assert {row["baseline"] for row in record.rows} == set(small.WAYS)
    assert all(row["p50"] > 0 for row in record.rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_is_the_measured_one(device: str) -> None:
    # of benchmarks/small.py: other files that end so are of fastclip beside its baselines
    every = sorted((ROOT / "benchmarks" / "results").glob("*-whole.json"))
    files = [file for file in every if records.read(file).settings["device"] == device]
    if not files:
        pytest.skip(f"no *-whole.json of a {device} in benchmarks/results: its limits are by hand")
    measured = small.limits(records.read(files[-1]).rows)
    found = {loss: min(entries, dense.MOST_SAVED) for loss, entries in measured.items()}
    assert found == {loss: dense.ENTRIES[device, loss] for loss in dense.LOSSES}, files[-1]
