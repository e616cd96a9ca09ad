"""The table of `fastclip quickstart`, of scores that are known; test_cli.py runs all of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastclip.cli import main, quickstart
from fastclip.train.config import TrainConfig


def test_each_score_is_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts that images find are `image -> text`. Three images have four captions."""
    images = SimpleNamespace(texts=[("a", "bb"), ("c",), ("d",)])
    scores = {"text_retrieval_recall@1": 0.11, "text_retrieval_recall@5": 0.22}
    scores |= {"image_retrieval_recall@1": 0.33, "image_retrieval_recall@5": 0.44}
    drawn: list[tuple[Any, ...]] = []
    run = tmp_path / "run"
    for name, value in (
        ("run_or_status", run),
        ("load", "the model"),
        ("embed_images", images),
        ("evaluate_zeroshot", {"acc1": 0.55}),
        ("evaluate_retrieval", scores),
    ):
        monkeypatch.setattr(quickstart, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(quickstart, "draw_retrieval", lambda *given: drawn.append(given))
    assert main(["quickstart", "--logs", str(tmp_path), "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    rows = [line.rsplit(maxsplit=2) for line in output.splitlines() if line.endswith("%")]
    # an image has two of four captions, or one; a caption has one of three images
    assert rows == [
        ["zero-shot top-1, 64 classes", "55.0%", "1.6%"],
        ["image -> text, recall@1", "11.0%", "33.3%"],
        ["image -> text, recall@5", "22.0%", "100.0%"],
        ["text -> image, recall@1", "33.0%", "33.3%"],
        ["text -> image, recall@5", "44.0%", "100.0%"],
    ]
    written = json.loads((run / "eval" / "zeroshot_retrieval_scenes.json").read_text())
    assert written["metrics"] == scores
    # the longest captions are asked for
    [(path, model, _, found, queries)] = drawn
    assert (path, model, found) == (run / "retrieval.png", "the model", images)
    assert queries[0] == "bb"


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "amp_bf16"), (False, "fp32")])
def test_bf16_is_for_devices_that_have_it(
    has_bf16: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def trained(config: TrainConfig) -> int:
        asked.append(config.model.precision)
        return 3

    monkeypatch.setattr("fastclip.device.has_bf16_product", lambda _: has_bf16)
    monkeypatch.setattr(quickstart, "run_or_status", trained)
    assert main(["quickstart", "--logs", str(tmp_path), "--device", "cpu"]) == 3
    assert asked == [precision]
