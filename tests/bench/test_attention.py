"""The attention benchmark, small, on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from fastclip.bench import attention_check as bench
from fastclip.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, the lab runs on it")
def test_rows_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "attention.json"
    flags = f"--lengths 50 77 --tokens 100 --rounds 2 --no-flex --device cpu --output {file}"
    assert main(["bench", "attention", *flags.split()]) == 0
    assert "\nn = 77 D = 64 causal\n  fastclip " in capsys.readouterr().out
    rows = json.loads(file.read_text())["results"]
    ours = [row for row in rows if row["baseline"] == "fastclip"]
    assert [(row["n"], row["causal"]) for row in ours] == [(50, False), (77, True)]
    timed = [row for row in rows if row["status"] == "ok"]
    assert {"fastclip", "fastclip packed", "sdpa math"} <= {row["baseline"] for row in timed}
    for row in timed:
        assert row["p20"] <= row["p50"] <= row["p80"] and row["forward"] > 0
        assert row["error"] < 1e-2
    # baselines of the GPU are rows that say so
    failed = {row["baseline"] for row in rows if row["status"].startswith("failed")}
    assert "sdpa cudnn" in failed


def test_lengths_that_are_not_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--lengths", "51"]) == 1
    assert "--lengths is 51; choose from 50 77 197" in capsys.readouterr().err


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.check("cpu", 4.0, None)

    def wrong(*tensors: torch.Tensor, **options) -> torch.Tensor:
        return 1.05 * original(*tensors, **options)

    original = bench.attention
    monkeypatch.setattr(
        bench,
        "attention",
        lambda *t, backend="auto", **o: (wrong if backend == "triton" else original)(
            *t, backend=backend, **o
        ),
    )
    assert not bench.check("cpu", 4.0, None)
