"""The record of a system's outputs, and the flat dictionary that it travels as."""

from pathlib import Path

import torch

from fastclip.models.rocket import Rocket
from fastclip.models.system import Features, Outputs, View
from tests.models.test_rocket import BATCH, SMALL, WIDTH, tiny_towers


def test_what_is_flattened_comes_back() -> None:
    one, two, three, four, five, six = torch.arange(6.0)
    features = Features((one, two), (three,), params=four)
    outputs = Outputs(features, {"weak_logit_scale": five}, Features((six,)))
    flat = outputs.flat()
    assert flat == {
        "image.0": one,
        "image.1": two,
        "text.0": three,
        "params": four,
        "criterion.weak_logit_scale": five,
        "teacher.image.0": six,
    }
    assert Outputs.of(flat) == outputs


def test_forward_hands_out_features_and_parameters(tmp_path: Path) -> None:
    """Parameters by the names of the state, which bounds and optimizers know them by."""
    system = Rocket(tiny_towers(tmp_path), WIDTH, **SMALL).double()
    flat = system(BATCH)
    outputs = Outputs.of(flat)
    assert set(outputs.features.views()) == {
        View(modality, number) for modality in ("image", "text") for number in range(3)
    }
    assert outputs.parameters.keys() == dict(system.criterion.named_parameters()).keys()
    assert outputs.taught == Features()
    assert system.bounds.keys() <= flat.keys() & dict(system.named_parameters()).keys()
