"""The loading benchmark measures what it says: every loader, whole epochs, the same shards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.bench import data
from fastclip.cli import main
from fastclip.data.shards import ShardSource


def test_every_loader_is_measured_and_the_result_written(
    make_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_shard(samples=24)
    output = tmp_path / "out" / "data.json"
    flags = f"--size 16 --batch-size 8 --workers 1 --rounds 2 --device cpu --output {output}"
    assert main(["bench", "data", str(shard), *flags.split()]) == 0
    printed = capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["settings"]["workers"] == 1 and "torch" in content["environment"]
    rows = {(row["task"], row["loader"]): row for row in content["results"]}
    assert rows.keys() == data.LOADERS.keys()
    for (task, loader), row in rows.items():
        if row["status"] != "ok":
            assert row["status"].startswith("not installed: ") and row["p50"] is None
            assert loader in printed[printed.index("Did not run: ") :]
            continue
        assert f"\n  {loader} " in printed[printed.index(f"\n{task}\n") :]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        own = rows[task, data.OWN]
        assert row["ratio"] == pytest.approx(row["p50"] / own["p50"])


def test_an_epoch_is_counted_whole(make_shard: Callable[..., Path]) -> None:
    source = ShardSource(str(make_shard(samples=24)))
    settings = data.DataSettings("", size=16, batch_size=8, workers=1)
    for key, build in data.LOADERS.items():
        try:
            epoch = build(settings, source)
        except ImportError:
            continue
        for _ in range(2):
            assert data._load(epoch(), "cpu") == 24, key


def test_too_few_samples_are_reported(
    make_shard: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", str(make_shard(samples=3)), "--device", "cpu"]) == 1
    assert "holds 3 samples, less than a batch of 64" in capsys.readouterr().err


def test_generated_pictures_are_as_large_as_photographs(tmp_path: Path) -> None:
    source = ShardSource(data.write_photographs(tmp_path, 4))
    assert source.counts == (2, 2)
    sample = source.read(1, 1)
    assert sample.image.size == (640, 480)
    assert sample.encoded is not None and 50_000 < len(sample.encoded) < 300_000
