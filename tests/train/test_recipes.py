"""Recipes of published code: their values, and the losses that they train, by its formulas.

What a published command says stands here once more, apart from the recipes.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fastclip.bounded import read_yaml
from fastclip.models import clip
from fastclip.models.options import CROSSED, SystemOptions
from fastclip.models.rocket import Rocket
from fastclip.models.uniclip import UniClip
from fastclip.train.config import RECIPES, parse
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.objective import objective_of
from tests.models import test_uniclip as uniclip
from tests.models.harness import WIDTH, loss_and_gradients, tiny_towers, views_of
from tests.models.test_rocket import BATCH, assert_equal, slow_loss
from tests.train.test_config import config_of
from tests.train.test_objective import Towers, inputs, slow

CONFIGS = Path(clip.__file__).with_name("configs")


class Loss(NamedTuple):
    """CLIP's two directions summed or averaged, the added term's weight, and label smoothing."""

    directions: str
    weight: float = 0.0
    smoothing: float = 0.0


class Command(NamedTuple):
    """A published command."""

    loss: Loss
    dropout: float = 0.0
    wd: float = 0.1
    layers: int = 12
    epochs: int = 32
    lr: float = 3e-3
    captions: str = "single"
    stop_words: float = 0.8
    cleaned: bool = False


ADDED = {"siamlip": (1.0, 0.1), "byolip": (1.0, 0.1), "barlip": (1.0, 0.1), "swalip": (0.2, 0.0)}
COMMANDS = {
    "rocket": Command(Loss("sum", smoothing=0.1), stop_words=0.9, cleaned=True),
    "rocket_cc3m": Command(Loss("avg", smoothing=0.1), dropout=0.2, wd=0.5, layers=6),
    "rocket_cc12m": Command(Loss("sum", smoothing=0.1), dropout=0.05),
    "rocket_29m": Command(Loss("sum", smoothing=0.1), lr=2e-3, captions="multi", cleaned=True),
    "slip": Command(Loss("avg", 1.0), epochs=25),
    "slip_cc3m": Command(Loss("avg", 1.0), epochs=40),
    "slip_cc12m": Command(Loss("avg", 1.0), epochs=35),
    "swalip_prototypes": Command(Loss("avg", 0.2), cleaned=True),
}
for name, added in ADDED.items():
    COMMANDS[name] = Command(Loss("sum", *added), cleaned=True)
    COMMANDS[f"{name}_cc3m"] = Command(Loss("avg", *added), dropout=0.2, wd=0.5, layers=6)
    COMMANDS[f"{name}_cc12m"] = Command(Loss("sum", *added), dropout=0.1)
# small twins, which follow no command
LOSSES = {
    **{name: command.loss for name, command in COMMANDS.items()},
    **{f"{name}_scenes": Loss("avg", *added) for name, added in ADDED.items()},
    **{name: Loss("avg", smoothing=0.1) for name in ("rocket_scenes", "cifar10_rocket")},
    "slip_scenes": Loss("avg", 1.0),
}
UNICLIP = ("uniclip", "uniclip_scenes", "cifar10_uniclip")
SEMANTIC = ("semantic", "semantic_negatives", "semantic_scenes", "semantic_negatives_scenes")


def test_every_recipe_is_here() -> None:
    found: dict[str, set[str]] = {"rocket": set(), "uniclip": set()}
    for path in RECIPES.glob("*.yaml"):
        objective = config_of(path.stem).model.objective
        if objective in (*CROSSED, "slip"):
            objective = "rocket"
        found.setdefault(objective, set()).add(path.stem)
    assert found["rocket"] == set(LOSSES) and found["uniclip"] == set(UNICLIP)


@pytest.mark.parametrize("recipe", COMMANDS)
def test_values_are_those_of_the_published_commands(recipe: str) -> None:
    config, command = config_of(recipe), COMMANDS[recipe]
    optim, model, data = config.optim, config.model, config.data
    assert (optim.lr, optim.wd, optim.epochs) == (command.lr, command.wd, command.epochs)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.98, 1e-8)
    assert (optim.global_batch, optim.grad_clip_norm) == (4096, None)
    assert optim.ema == (0.99 if model.objective == "byolip" else None)
    assert model.text_dropout == command.dropout
    assert data.caption_views == command.captions
    assert (data.stop_word_rate, data.clean_captions) == (command.stop_words, command.cleaned)
    # strong texts are strong in any case
    assert data.text_augment == ("none" if model.objective == "slip" else "weak")
    assert config.loss.group_duplicates is None
    assert model.model.startswith("ViT-B-16-slip" if model.objective == "slip" else "RN50-rocket")
    text = json.loads((CONFIGS / f"{model.model}.json").read_text())["text_cfg"]
    assert text["layers"] == command.layers
    views = {"slip": (3, 1), "swalip_prototypes": (1, 1)}
    assert model.views == views.get(recipe.split("_cc")[0], (3, 3))


def shrunk(options: SystemOptions) -> SystemOptions:
    """The same loss on narrow heads, without what is drawn."""
    sizes = {"head_width": 8, "projector_hidden": 9, "projector_width": 7, "prototypes": 5}
    given = {name: size for name, size in sizes.items() if getattr(options, name) is not None}
    if options.objective in CROSSED:
        given["head_hidden"] = 10
    return replace(options, text_dropout=0.0, **given)


def move(module: nn.Module, size: float = 0.2) -> None:
    """Away from where it begins: some layers are zero there."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)


def make(options: SystemOptions, folder: Path, seed: int) -> Rocket:
    system = Rocket.of(tiny_towers(folder), WIDTH, options).double()
    torch.manual_seed(seed)
    move(system.criterion)
    move(system.towers, 0.01)
    return system


@pytest.mark.parametrize("recipe", LOSSES)
def test_a_recipe_trains_the_published_loss(recipe: str, tmp_path: Path) -> None:
    """The loss of a command that sums is twice ours: AdamW sees no factor."""
    options, loss = shrunk(config_of(recipe).model), LOSSES[recipe]
    system = make(options, tmp_path, seed=2)
    teacher = make(options, tmp_path, seed=3) if system.needs_teacher else None
    batch = views_of(BATCH, system)
    asked: dict[str, Any] = {
        "term": None if options.objective == "rocket" else options.objective,
        "strong_views": options.strong,
        "label_smoothing": loss.smoothing,
    }
    if options.prototypes is not None:
        asked["prototypes"] = options.prototypes
    clip, one = (slow_loss(system, batch, teacher, {**asked, "term_weight": w}) for w in (0.0, 1.0))
    factor = {"sum": 2, "avg": 1}[loss.directions]
    published = (factor * clip + loss.weight * (one - clip)) / factor
    trained = {n: p for n, p in system.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(published, list(trained.values()))
    expected = {"loss": published.detach(), **dict(zip(trained, grads, strict=True))}
    assert_equal(loss_and_gradients(system, batch, teacher), expected)


@pytest.mark.parametrize("recipe", UNICLIP)
def test_uniclips_recipes_train_mp_nce(recipe: str, tmp_path: Path) -> None:
    """Of three kinds of pairs that contribute alike, each with a temperature and an offset."""
    options = replace(config_of(recipe).model, head_width=10)
    system = UniClip.of(tiny_towers(tmp_path), WIDTH, options).double()
    move(system.criterion)
    batch = uniclip.draw(4, *options.views)
    found = loss_and_gradients(system, batch)
    system.zero_grad()
    loss = uniclip.slow_loss(system, batch, {})
    loss.backward()
    grads = {n: p.grad for n, p in system.named_parameters() if p.requires_grad}
    assert len(system.criterion.log_temperature) == 3 and system.criterion.uses_augmentation
    assert_equal(found, {"loss": loss.detach(), **grads})


@pytest.mark.parametrize("recipe", SEMANTIC)
def test_semantic_recipes_train_clips_loss(recipe: str) -> None:
    """In the second phase with the false captions as further columns."""
    config, batch = config_of(recipe), inputs()
    count = config.model.hard_negatives
    assert count == ("negatives" in recipe)
    negatives = batch.pop("negatives")[:, :count]
    towers, reference = Towers(), Towers()
    objective = objective_of(towers, config)
    given = {**batch, "negatives": negatives} if count else batch
    found = objective.loss(objective.outputs(towers, given))
    expected = slow(reference, batch["texts"][0], negatives, smoothing=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found.backward()
    expected.backward()
    for one, other in zip(towers.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_of_a_global_batch_say_how_many_gpus(recipe: str) -> None:
    """The number is in a comment: 4,096 in steps of 128 are 32 GPUs."""
    optim, path = config_of(recipe).optim, RECIPES / f"{recipe}.yaml"
    if optim.global_batch is None:
        return
    gpus, left = divmod(optim.global_batch, optim.step_samples(1))
    text = path.read_text()
    if "global_batch" in read_yaml(path):
        (text,) = re.findall(r"(#.*)\nglobal_batch:", text)
    else:
        # another recipe has it
        assert f"{optim.global_batch:,} samples a step" in text
    assert left == 0 and f"{gpus} GPUs" in text


@pytest.mark.parametrize("flags", ["--pair-loss mil-nce", "--pair-loss sup-con"])
def test_ablations_of_uniclip_train(flags: str, train_flags: list[str]) -> None:
    given = [*train_flags, "--train-num-samples", "32", *flags.split(), "--name", "a"]
    run = train(parse(["--config", "uniclip_scenes", *given]))
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert len(losses) == 8 and all(map(math.isfinite, losses))
