"""How a classifier of --classifier zeroshot begins."""

from typing import Any

import pytest
import torch

from fastclip.models.build import build
from fastclip.models.options import SystemOptions
from fastclip.train import classifier
from fastclip.train.config import TrainConfig


def test_prompts_are_encoded_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Found(Exception):
        pass

    def load(path: str, device: Any = "cpu", **options: Any) -> None:
        asked.append(torch.device(device))
        raise Found

    monkeypatch.setattr(classifier, "load", load)
    options = {"objective": "classify", "classifier": "prototype"}
    model = build("ViT-mini-16px", SystemOptions(**options), classes=["a", "b"])
    # for a GPU
    model.model.to("meta")
    config = TrainConfig.from_flat(objective="classify", classifier="zeroshot", finetune="run")
    with pytest.raises(Found):
        classifier.begin_classifier(config, model, ["a", "b"])
    assert asked == [torch.device("meta")]
