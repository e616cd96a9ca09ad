"""The record of a system's outputs, and the flat dictionary that it travels as."""

from pathlib import Path

import torch

from fastclip.models.rocket import Rocket
from fastclip.models.system import Outputs
from tests.models.test_rocket import BATCH, SMALL, WIDTH, tiny_towers


def test_what_is_flattened_comes_back() -> None:
    one, two, three = torch.arange(3.0)
    outputs = Outputs({"image.0": one}, {"weak_logit_scale": two}, {"image.0": three})
    flat = outputs.flat()
    assert flat == {
        "image.0": one,
        "criterion.weak_logit_scale": two,
        "teacher.image.0": three,
    }
    assert Outputs.of(flat) == outputs


def test_forward_hands_out_features_and_parameters(tmp_path: Path) -> None:
    """Parameters by the names of the state, which bounds and optimizers know them by."""
    system = Rocket(tiny_towers(tmp_path), WIDTH, **SMALL).double()
    flat = system(BATCH)
    outputs = Outputs.of(flat)
    assert outputs.features.keys() == {
        f"{kind}.{view}" for kind in ("image", "text") for view in range(3)
    }
    assert outputs.parameters.keys() == dict(system.criterion.named_parameters()).keys()
    assert not outputs.taught
    assert system.bounds.keys() <= flat.keys() & dict(system.named_parameters()).keys()
