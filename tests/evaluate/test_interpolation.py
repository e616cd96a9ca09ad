"""The weight between two heads: one encoding serves all weights, and the best is found."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastclip.data.faults import FaultLog
from fastclip.evaluate.features import ImageFeatures
from fastclip.evaluate.interpolation import accuracy_by_head_weight, choose_head_weight
from fastclip.evaluate.zeroshot import evaluate_zeroshot
from fastclip.models.clip import Model, create
from fastclip.models.rocket import Rocket
from tests.models.harness import WIDTH, tiny_towers

CLASSES, TEMPLATES = ["red", "green", "blue"], ["a {}.", "some {}."]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    towers = tiny_towers(tmp_path)
    system = Rocket(towers, WIDTH, head_hidden=12).double().eval()
    return create(str(tmp_path / "tiny.json"))._replace(model=system)


def embedded(model: Model) -> ImageFeatures:
    """Encodings of 40 images at the present weight, drawn instead of computed by the tower."""
    generator = torch.Generator().manual_seed(3)
    parts = F.normalize(torch.randn(2, 40, WIDTH, generator=generator).double(), dim=-1)
    features = model.model.weigh(*parts)
    labels = [i % 3 for i in range(40)]
    return ImageFeatures(features.float(), [("a",)] * 40, labels, ["k"] * 40, FaultLog())


def test_every_weight_is_what_encoding_at_it_gives(model: Model) -> None:
    swept = accuracy_by_head_weight(model, embedded(model), CLASSES, TEMPLATES)
    assert len(swept) == 11
    for weight, accuracy in swept.items():
        model.model.head_weight.fill_(weight)
        found = evaluate_zeroshot(model, embedded(model), CLASSES, TEMPLATES)
        assert found["acc1"] == accuracy, weight
    assert len(set(swept.values())) > 1, "every weight is alike: nothing depends on it"


def test_the_best_weight_nearest_the_middle() -> None:
    assert choose_head_weight({0.0: 0.3, 0.4: 0.5, 0.8: 0.5, 1.0: 0.2}) == 0.4
    assert choose_head_weight({0.4: 0.5, 0.6: 0.5}) == 0.4


def test_a_model_without_two_heads_is_refused(model: Model, tmp_path: Path) -> None:
    plain = create(str(tmp_path / "tiny.json"))
    with pytest.raises(ValueError, match="CLIP has no weak and strong heads"):
        accuracy_by_head_weight(plain, embedded(model), CLASSES, TEMPLATES)
