"""What losses keep for the backward is linear in the batch, what dense baselines keep is not."""

import json
from pathlib import Path

import pytest

from fastclip.bench import memory, screen
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Settings
from fastclip.cli import main

SETTINGS = Settings(compiled=False)
WIDTH = 16
# keep what they have computed, one float32 of S or more
DENSE = ("open_clip", "cross_entropy", "lightly", "dense", "pytorch_metric_learning")


@pytest.mark.parametrize("name", OPERATORS)
def test_saved_bytes_are_linear(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Features' gradients at most, which are as large as the features, and a few lines of rows."""
    sizes = [64, 128, 256]
    with screen.Rows("memory", SETTINGS, "cpu", None) as kept:
        rows = memory.run([name], sizes, [WIDTH], SETTINGS, kept.add)
    for row in rows:
        if row.baseline == "fastclip":
            assert row.saved_bytes is not None
            # all blocks together have n rows of NT-Xent, MP-NCE, SupCon, and 2 n of the others
            assert row.saved_bytes <= 2 * row.n * WIDTH * 4 + 80 * row.n
            assert row.saved_exponent is None or row.saved_exponent <= 1.05
        elif row.baseline in DENSE and row.saved_bytes is not None:
            assert row.saved_bytes >= 4 * row.n * row.n
    last = {row.baseline: row for row in rows if row.n == sizes[-1]}
    ran = {baseline for baseline, row in last.items() if row.status == "ok"} - {"fastclip"}
    assert ran
    ours = last["fastclip"].saved_bytes or 0
    assert all(ours < (last[baseline].saved_bytes or 0) for baseline in ran & set(DENSE))
    assert "fastclip" in capsys.readouterr().out


def test_checkpointed_chunks_keep_no_logits() -> None:
    rows = {row.baseline: row for row in memory.measure(OPERATORS["clip"], 256, WIDTH, SETTINGS)}
    kept = rows["checkpointed chunks twice"].saved_bytes
    assert kept is not None and kept < 256 * 256 * 4


def test_a_storage_counts_once_and_inputs_do_not() -> None:
    import torch

    x = torch.ones(10, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        squares = x * x  # keeps x, twice
        return (squares.exp() + squares.sin()).sum()  # keeps exp's result, and squares

    assert memory.saved_bytes(loss, [x]) == 2 * 40


def test_rows_and_json(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    flags = f"--loss clip --n 64 128 --width 16 --no-compiled --device cpu --output {file}"
    assert main(["bench", "memory", *flags.split()]) == 0
    content = json.loads(file.read_text())
    assert content["benchmark"] == "memory"
    ours = [row for row in content["results"] if row["baseline"] == "fastclip"]
    assert [row["n"] for row in ours] == [64, 128]
    assert ours[0]["saved_exponent"] is None and ours[1]["saved_exponent"] == pytest.approx(
        1, abs=0.05
    )
    assert main(["bench", "report", str(file), "-o", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report-0-memory-clip-16.svg").is_file()
    assert main(["bench", "compare", str(file), str(file)]) == 0
