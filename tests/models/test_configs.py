"""Model configs and recipes that are shipped: they build, at the sizes that they say."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastclip.functional import clip_loss
from fastclip.models import clip
from fastclip.models.build import build
from fastclip.models.lock import lock_image
from fastclip.models.options import SystemOptions
from fastclip.train.accumulate import refuse_batch_norm
from fastclip.train.config import parse

CONFIGS = sorted(path.stem for path in Path(clip.__file__).with_name("configs").glob("*.json"))
# width of the features, pixels, and millions of parameters of image and text tower; EfficientNet's
# and CoAtNet's papers give 480 (L2), 66 (B7, with its classifier) and 688
SIZES = {
    "EfficientNet-L2-align": (1376, 289, 485, 354),
    "EfficientNet-B7-align": (640, 289, 65, 124),
    "CoAtNet-5-basic": (2048, 224, 690, 710),
    "TinyNet-E-align": (256, 64, 1.1, 6.8),
    "EfficientViT-B0-basic": (256, 64, 2.5, 6.8),
}
TWINS = ("TinyNet-E-align", "EfficientViT-B0-basic")
LOCKED = SystemOptions(lock_image=True, lock_image_freeze_bn_stats=True)


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def tokens(model: Any, rows: int) -> torch.Tensor:
    """Texts of half the context, that end as CLIP's do."""
    generator = torch.Generator().manual_seed(0)
    length = model.context_length // 2
    text = torch.zeros(rows, model.context_length, dtype=torch.long)
    text[:, :length] = torch.randint(1, 40_000, (rows, length), generator=generator)
    text[:, length] = 49_407
    return text


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_build_at_their_sizes(name: str) -> None:
    # hundreds of millions of parameters without their memory
    with torch.device("meta"):
        model: Any = clip.create(name, "meta").model.eval()
        size = model.visual.image_size[0]
        image = model.encode_image(torch.empty(2, 3, size, size))
        text = model.encode_text(torch.empty(2, model.context_length, dtype=torch.long))
    assert image.shape == text.shape
    if name in SIZES:
        width, pixels, *towers = SIZES[name]
        assert (image.shape, size) == ((2, width), pixels)
        assert [millions(model.visual), millions(model.text)] == pytest.approx(towers, rel=0.05)


@pytest.mark.parametrize("name", TWINS)
def test_the_text_tower_sees_both_directions(name: str) -> None:
    model: Any = clip.create(name).model.eval()
    model.text.output_tokens = True
    text = tokens(model, 3)
    other = text.clone()
    other[:, 5] += 1
    (_, before), (_, after) = model.text(text), model.text(other)
    # of the first token, by what stands behind it
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", TWINS)
def test_twins_learn_a_batch(name: str) -> None:
    torch.manual_seed(0)
    model: Any = clip.create(name).model.train()
    image, text = torch.randn(16, 3, 64, 64), tokens(model, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        output = model(image, text)
        loss = clip_loss(**output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_locked_image_tower_is_a_fixed_map_that_the_gradient_cache_takes() -> None:
    """Its batch normalizations are replaced, with the activations that timm puts into them."""
    towers: list[Any] = []
    for options in (SystemOptions(), LOCKED):
        torch.manual_seed(0)
        towers.append(build("EfficientViT-B0-basic", options).model)
    free, locked = towers
    assert any(isinstance(module, _BatchNorm) for module in free.visual.modules())
    refuse_batch_norm(locked.train(), 2)
    image = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(locked.encode_image(image), free.eval().encode_image(image))
    assert not any(parameter.requires_grad for parameter in locked.visual.parameters())
    assert all(parameter.requires_grad for parameter in locked.text.parameters())


def test_the_stages_of_attention_can_be_unlocked_under_the_gradient_cache() -> None:
    """BASIC's third phase: CoAtNet has batch normalization in its stages of convolution alone."""
    with torch.device("meta"):
        model: Any = clip.create("CoAtNet-5-basic", "meta").model.train()
        lock_image(model, replace(LOCKED, lock_image_unlocked_groups=3))
    refuse_batch_norm(model, 2)
    trunk = model.visual.trunk
    free = [any(p.requires_grad for p in stage.parameters()) for stage in trunk.stages]
    assert free == [False, False, True, True]
    assert not any(parameter.requires_grad for parameter in trunk.stem.parameters())


@pytest.mark.parametrize(
    ("recipe", "model", "samples"),
    [
        ("align", "EfficientNet-L2-align", 64),
        ("align_scenes", "TinyNet-E-align", 128),
        ("basic_image", "CoAtNet-5-basic", 64),
        ("basic_image_scenes", "EfficientViT-B0-basic", 128),
        ("basic", "CoAtNet-5-basic", 4096),
        ("basic_scenes", "EfficientViT-B0-basic", 512),
    ],
)
def test_recipes_train_what_they_are_named_after(recipe: str, model: str, samples: int) -> None:
    config = parse(["--config", recipe])
    assert (config.model.model, config.optim.step_samples(1)) == (model, samples)
    # or the gradient cache refuses the tower's batch normalization
    locked = config.model.lock_image and config.model.lock_image_freeze_bn_stats
    assert locked == (config.optim.accum_freq > 1)


@pytest.mark.parametrize(
    ("name", "width"), [("RN50-rocket", 2048), ("RN50-rocket-cc3m", 2048), ("ViT-B-16-slip", 768)]
)
def test_towers_of_published_recipes_are_those_of_their_code(name: str, width: int) -> None:
    """The text tower has QuickGELU; the image tower has timm's activations, and no projection."""
    with torch.device("meta"):
        model: Any = clip.create(name, "meta").model
    towers = model.transformer, model.visual
    kinds = [{type(module).__name__ for module in tower.modules()} for tower in towers]
    assert "QuickGELU" in kinds[0] and "GELU" not in kinds[0]
    assert "QuickGELU" not in kinds[1]
    assert model.visual.trunk.num_features == width
    assert isinstance(model.visual.trunk.get_classifier(), nn.Identity)
    assert not list(model.visual.head.parameters())


@pytest.mark.parametrize("recipe", ["rocket", "siamlip", "byolip", "barlip", "swalip", "slip"])
def test_recipes_of_published_code_take_duplicates_as_it_does(recipe: str) -> None:
    """Their labels are positions in the batch: a sample with the same caption is a negative."""
    config = parse(["--config", recipe])
    assert config.loss.group_duplicates is None
    assert config.model.model == ("ViT-B-16-slip" if recipe == "slip" else "RN50-rocket")


def test_a_file_with_a_models_name_stands_for_itself_alone(tmp_path: Path) -> None:
    """Neither open_clip's model of that name nor another file's takes its place."""
    config = copy.deepcopy(open_clip.get_model_config("RN50"))
    own = {**config, "quick_gelu": True, "embed_dim": 32}
    own["vision_cfg"] = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}
    own["text_cfg"] = {**config["text_cfg"], "layers": 1, "width": 64, "heads": 2}
    files = [tmp_path / folder / "RN50.json" for folder in ("student", "teacher")]
    for width, file in zip((32, 48), files, strict=True):
        file.parent.mkdir()
        file.write_text(json.dumps({**own, "embed_dim": width}))
    student = clip.create(str(files[0]))
    clip.create(str(files[1]))
    described = clip.describe(str(files[0]), student)["model_cfg"]
    assert described["embed_dim"] == 32 and described["quick_gelu"]
    assert open_clip.get_model_config("RN50") == config
    paths = open_clip.factory._MODEL_CONFIG_PATHS
    assert len(paths) == len(set(paths))
