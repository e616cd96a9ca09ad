"""The weight between two heads: one encoding serves all weights, and the best is found."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastclip.data.faults import FaultLog
from fastclip.evaluate.features import ImageFeatures
from fastclip.evaluate.interpolation import (
    accuracy_by_head_weight,
    choose_head_weight,
    weigh_heads,
)
from fastclip.evaluate.zeroshot import class_embeddings, evaluate_zeroshot
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


def test_the_weight_is_chosen_on_held_out_images_alone(model: Model) -> None:
    """Where the strong head is right of them, and of the images that are scored the weak one.

    Between two classes each weight is right of the one or of the other.
    """
    classes = CLASSES[:2]
    weak, strong = model.model.weak_and_strong(class_embeddings(model, classes, TEMPLATES).double())
    held_out, images = (
        ImageFeatures(
            model.model.weigh(*parts).float(), [("a",)] * 2, [0, 1], ["0", "1"], FaultLog()
        )
        for parts in ((weak.flip(0), strong), (weak, strong.flip(0)))
    )
    weighed, weight = weigh_heads(model, held_out, images, classes, TEMPLATES)
    assert model.model.head_weight.item() == pytest.approx(weight)
    assert evaluate_zeroshot(model, weighed, classes, TEMPLATES)["acc1"] == 0
    _, weight = weigh_heads(model, images, images, classes, TEMPLATES)
    assert accuracy_by_head_weight(model, images, classes, TEMPLATES)[weight] == 1


def test_a_model_without_two_heads_is_refused(model: Model, tmp_path: Path) -> None:
    plain = create(str(tmp_path / "tiny.json"))
    with pytest.raises(ValueError, match="CLIP has no weak and strong heads"):
        accuracy_by_head_weight(plain, embedded(model), CLASSES, TEMPLATES)
