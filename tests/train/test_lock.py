"""Locked towers: which parameters are trained, and that the others keep their bits."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastclip.models import checkpoint, sharded
from fastclip.models.build import build
from fastclip.models.lock import lock_text
from fastclip.models.options import SystemOptions
from fastclip.train.accumulate import refuse_batch_norm
from fastclip.train.config import parse
from fastclip.train.loop import train
from tests.processes import finish
from tests.train.conftest import TINY_MODEL

VIT: dict[str, Any] = {
    **TINY_MODEL,
    "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 2},
    "text_cfg": {**TINY_MODEL["text_cfg"], "layers": 3},
}
RESNET = {**VIT, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
CONFIGS = {
    "vit": VIT,
    "custom text": {**VIT, "custom_text": True},
    "resnet": RESNET,
    "timm": {
        **VIT,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 32},
    },
}


# what open_clip leaves unlocked of timm's towers in any case
HEADS = {"visual.head.proj.weight"}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"{request.param.replace(' ', '_')}.json"
    path.write_text(json.dumps(CONFIGS[request.param]))
    return str(path)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("groups", [0, 1, 2, 9])
def test_the_groups_are_open_clips(config: str, groups: int) -> None:
    free = build(config, SystemOptions()).model
    image = build(config, SystemOptions(lock_image=True, lock_image_unlocked_groups=groups)).model
    theirs = copy.deepcopy(free)
    if "resnet" in config:
        # which open_clip locks whole
        names = ["attnpool.", "layer4.", "layer3.", "layer2.", "layer1.", ""][:groups]
        own = {n for n in trained(free) if n.startswith(tuple(f"visual.{name}" for name in names))}
        wanted = {n for n in trained(free) if not n.startswith("visual.")} | (
            own if names else set()
        )
    else:
        theirs.lock_image_tower(unlocked_groups=groups)
        wanted = trained(theirs)
    assert trained(image) == wanted
    assert (groups == 0) == (not any(name.startswith("visual.") for name in wanted - HEADS))

    options = SystemOptions(lock_text=True, lock_text_unlocked_layers=groups)
    theirs = copy.deepcopy(free)
    theirs.lock_text_tower(unlocked_layers=groups, freeze_layer_norm=True)
    text = trained(build(config, options).model)
    assert text == trained(theirs)
    of_text = {name for name in trained(free) if not name.startswith(("visual.", "logit_"))}
    assert len(of_text & text) == {0: 0, 1: 1}.get(groups, len(of_text & text))
    assert {name for name in text if name.startswith("visual.")} and "logit_scale" in text


@pytest.mark.parametrize("frozen", [False, True])
def test_a_language_tower_of_hugging_face(frozen: bool, tmp_path: Path) -> None:
    """Its layer norms are trained, unless they are to be frozen."""
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    named = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = transformers.RobertaConfig(**named, intermediate_size=8, vocab_size=32)
    model = build("ViT-mini-16px", SystemOptions()).model
    tower = HFTextEncoder("", output_dim=64, config=small, proj_type="linear", pretrained=False)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text = model.visual, tower

        def lock_text_tower(self, layers: int, freeze_layer_norm: bool) -> None:
            self.text.lock(layers, freeze_layer_norm)

    options = SystemOptions(
        lock_text=True, lock_text_unlocked_layers=1, lock_text_freeze_layer_norm=frozen
    )
    lock_text(Both(), options)
    names = {name for name, p in tower.transformer.named_parameters() if p.requires_grad}
    assert any(name.startswith("encoder.layer.2.attention.self") for name in names)
    below = {name for name in names if name.startswith(("embeddings.", "encoder.layer.0"))}
    assert bool(below) != frozen and all("LayerNorm" in name for name in below)


def test_frozen_statistics(tmp_path: Path) -> None:
    """Of the locked groups alone, and then several micro-batches are the whole batch."""
    path = tmp_path / "resnet.json"
    path.write_text(json.dumps(RESNET))
    options = {"lock_image": True, "lock_image_freeze_bn_stats": True}
    model = build(str(path), SystemOptions(**options, lock_image_unlocked_groups=2)).model.train()
    kinds = {name: type(module) for name, module in model.visual.named_modules()}
    assert kinds["layer4.0.bn1"] is nn.BatchNorm2d
    assert kinds["layer3.0.bn1"] is not nn.BatchNorm2d and kinds["bn1"] is kinds["layer3.0.bn1"]
    with pytest.raises(ValueError, match="layer4"):
        refuse_batch_norm(model, 2)
    refuse_batch_norm(build(str(path), SystemOptions(**options)).model.train(), 2)


LOCKS = [
    "--lock-image --lock-text --lock-text-unlocked-layers 1",
    "--lock-text --lock-image --lock-image-unlocked-groups 1 --accum-freq 2",
]


@pytest.mark.parametrize("locks", LOCKS)
def test_what_is_locked_keeps_its_bits(locks: str, train_flags: list[str]) -> None:
    path = Path(train_flags[train_flags.index("--model") + 1])
    flags = [*train_flags, "--train-num-samples", "32", "--epochs", "1", "--wd", "1"]
    given = parse([*flags, "--name", "a", *locks.split()])
    torch.manual_seed(given.optim.seed)
    before = build(str(path), given.model).model
    run = train(given)
    content = checkpoint.read(run / "checkpoints" / "epoch_1.pt")
    changed = {
        name
        for name, value in before.state_dict().items()
        if not value.equal(content["state_dict"][name])
    }
    assert changed == trained(before)
    assert len(content["optimizer"]["state"]) == len(changed)
    # nothing of the lock is left in the model that is loaded
    assert given.model.lasting() == parse(flags).model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lock_text_unlocked_layers": 1}, "--lock-text-unlocked-layers needs --lock-text"),
        ({"lock_text": True, "lock_text_unlocked_layers": -1}, "is -1; give at least 0"),
        ({"lock_text": True, "objective": "simclr"}, "--lock-text is for clip, uniclip"),
        ({"lock_text": True, "text_lm": "x"}, "the last --text-lm-unfrozen layers are trained"),
    ],
)
def test_what_cannot_be_locked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SystemOptions(**given)


@pytest.mark.slow
def test_under_deepspeed_it_is_as_without(
    train_flags: list[str], start_training: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    flags = [*train_flags, *LOCKS[0].split(), "--train-num-samples", "32"]
    plain = train(parse([*flags, "--name", "plain"]))
    zero = ["--deepspeed", "--deepspeed-config", "ds_zero3", "--name", "zero"]
    finish([start_training(*flags, *zero)])
    folder = tmp_path / "logs" / "zero" / "checkpoints" / "epoch_2"
    content = checkpoint.read(plain / "checkpoints" / "epoch_2.pt")["state_dict"]
    found = sharded.export(folder)
    model = build(str(tmp_path / "tiny.json"), parse(flags).model).model
    for name in content:
        if name in trained(model):
            torch.testing.assert_close(found[name], content[name], rtol=1e-4, atol=1e-5)
        else:
            assert found[name].equal(content[name]), name
