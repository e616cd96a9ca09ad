"""Global losses beside CLIP's: the same samples for each, seed after seed."""

import json
from pathlib import Path

import pytest

from fastclip.study import cifar10, global_loss
from fastclip.study.global_loss import study
from tests.study.test_cifar10 import data as data
from tests.train.conftest import TINY_MODEL


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_losses_in_a_table(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "HELD_OUT", 4)
    monkeypatch.setattr(global_loss, "BATCH", 30)
    kept = {name: global_loss.LOSSES[name] for name in ("CLIP", "FastCLIP v3")}
    monkeypatch.setattr(global_loss, "LOSSES", kept)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = f"--model {tmp_path}/tiny.json --workers 0 --device cpu --precision fp32 "
    flags += "--log-every-n-steps 1"
    report = study(data, tmp_path / "out", epochs=1, seeds=1, flags=flags.split())
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows.keys() == kept.keys()
    # eight images are scored
    assert all((outcome["scores"]["accuracy"] * 8).is_integer() for (outcome,) in rows.values())
    assert rows["FastCLIP v3"][0]["flags"][-6:-2] == ["--loss", "global", "--global-variant", "v3"]
    assert "| FastCLIP v3 |" in report and "Batches of 30, 1 epochs, 1 seeds" in report
