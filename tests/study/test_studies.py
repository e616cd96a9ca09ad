"""Studies on a tiny model: each run comes to its table, and none is made twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastclip.cli import main
from fastclip.study import collages, runs, systems, uniclip
from fastclip.study.question import Settings, answer
from fastclip.study.runs import FailedRunError, run
from tests.train.conftest import TINY_MODEL


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run of four steps; 60 scenes judge it."""
    monkeypatch.setattr(runs, "SCENES", 60)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = f"--model {tmp_path}/tiny.json --train-num-samples 32 --batch-size 8 --epochs 1 "
    return (flags + "--workers 0 --device cpu --precision fp32 --log-every-n-steps 1").split()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_systems_that_begin_with_others(tiny: list[str], tmp_path: Path) -> None:
    # the recipe's own validation data are of no use to four steps
    report = systems.study(tmp_path / "out", ["clip", "rocket", "finetuned"], tiny)
    rows = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["clip", "rocket", "simclr", "finetuned", "chance"]
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert 0 <= found["rocket"][0]["scores"]["head_weight"] <= 1
    assert found["simclr"][0]["scores"] == {}
    assert found["finetuned"][0]["chance"].keys() == {"accuracy"}
    for outcomes in found.values():
        assert outcomes[0]["first_loss"] > 0 and outcomes[0]["seconds"] > 0
    # the image tower is the one that simclr left, where nothing is learned
    begun = tmp_path / "out" / "simclr"
    flags = ["--config", "classify_scenes", *tiny, "--lr", "0", "--wd", "0"]
    run("same", [*flags, "--finetune", str(begun)], tmp_path)
    weights = [
        torch.load(folder / "checkpoints" / "epoch_1.pt")["state_dict"]
        for folder in (begun, tmp_path / "same")
    ]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0] if "visual" in n)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_a_study_goes_on_where_it_was(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collages, "COLLAGES", 60)
    settings = Settings(
        tmp_path / "out", seeds=(0,), jobs=2, only=("CLIP", "UniCLIP", "MIL-NCE"), flags=tuple(tiny)
    )
    first = answer(uniclip.QUESTION, settings)
    assert "| MIL-NCE | " in first and "UniCLIP is better than CLIP (" in first
    assert "SLIP" not in first
    made = (tmp_path / "out" / "mil_nce-0" / "outcome.json").stat().st_mtime_ns
    second = answer(uniclip.QUESTION, settings)
    assert second == first
    assert (tmp_path / "out" / "mil_nce-0" / "outcome.json").stat().st_mtime_ns == made
    with pytest.raises(FileExistsError, match="is of other flags; choose another --output"):
        answer(uniclip.QUESTION, replace(settings, flags=(*tiny, "--lr", "1e-3")))


def test_a_run_that_fails_reports_how(tmp_path: Path) -> None:
    with pytest.raises(
        FailedRunError, match=r"(?s)run bad ended with status 1; .*'nonsense' is unknown"
    ):
        run("bad", ["--model", "nonsense"], tmp_path)


def test_an_unknown_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "systems", "--only", "clap", "--output", str(tmp_path)]) == 1
    assert "unknown: clap; use clip, siglip" in capsys.readouterr().err
