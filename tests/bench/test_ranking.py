"""The benchmark of sentence-transformers' cached loss."""

from pathlib import Path

from fastclip.bench import ranking, records


def test_both_are_measured_and_right(tmp_path: Path) -> None:
    file = tmp_path / "ranking.json"
    ranking.main(["--output", str(file), "--n", "70", "--width", "16", "--rounds", "2"])
    rows = {row["baseline"]: row for row in records.read(file).rows}
    assert set(rows) == {ranking.OURS, ranking.THEIRS}
    for row in rows.values():
        assert row["p50"] > 0 and row["error"] < 1e-5 and row["peak_bytes"] is not None
