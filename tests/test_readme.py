"""What the README shows works as it stands."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import tyro

import fastclip
from fastclip.cli.bench import AttentionConfig, Config, DataConfig, LossConfig
from fastclip.cli.eval import Command
from fastclip.cli.plan import PlanConfig
from fastclip.cli.study import All, Cifar10, Robustness, Study, Systems
from fastclip.models.options import Objective
from fastclip.train.config import parse
from tests.ops.test_contracts import PRODUCTS
from tests.test_repo_shape import ROOT

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_drop_in_runs() -> None:
    (snippet,) = [block for block in blocks("python") if "import ClipLoss" in block]
    features = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    names = {"image_features": features, "text_features": features, "logit_scale": 10.0}
    exec(snippet, names)
    assert torch.isfinite(names["loss"])


def test_the_views_are_as_shown(make_shard: Callable[..., Path]) -> None:
    (snippet,) = [block for block in blocks("python") if "Augmentation.strong" in block]
    names = {
        "shards": str(make_shard(samples=8)),
        "tokenizer": lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64),
        "batch_size": 4,
    }
    exec(snippet, names)
    batch = names["batch"]
    assert [tuple(images.shape) for images in batch["images"]] == [(4, 3, 224, 224)] * 3
    assert batch["images"][0].dtype == torch.uint8 and batch["params"].shape == (4, 3, 18)
    view = names["replay"](
        names["source"].read(0, int(batch["key"][0])).image, batch["params"][0, 2], 224
    )
    assert torch.equal(view, batch["images"][2][0])


def commands(name: str) -> list[list[str]]:
    """The words of every `fastclip NAME ...` in a shell block."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[:2] == ["fastclip", name]]


def test_train_commands_parse() -> None:
    found = commands("train")
    assert len(found) == 5
    for words in found:
        name = parse([word for word in words[2:] if word != "..."]).name
        assert name in ("first", "cifar10", "captions", "uniclip")


def test_launchers_commands_parse() -> None:
    """What follows the launcher are flags of `fastclip train`."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if "fastclip.cli train" in line]
    assert {words[0] for words in found} == {"torchrun", "deepspeed"} and len(found) == 3
    for words in found:
        flags = words[words.index("train") + 1 :]
        config = parse([word for word in flags if word != "..."])
        assert config.deepspeed == (words[0] == "deepspeed")


def test_plan_commands_parse() -> None:
    (words,) = commands("plan")
    assert tyro.cli(PlanConfig, args=words[2:]).gpus == 64


def test_bench_commands_parse() -> None:
    found = [tyro.cli(Config, args=words[2:]) for words in commands("bench")]
    assert [type(config) for config in found] == [LossConfig] * 2 + [AttentionConfig, DataConfig]


def test_eval_commands_parse() -> None:
    found = commands("eval")
    assert len(found) == 10
    for words in found:
        command = tyro.cli(Command, args=words[2:])
        assert type(command).__name__.lower() == words[2].replace("-", "")


def test_the_table_of_evaluations() -> None:
    """It has all commands that measure a model."""
    table = TEXT.split("| `fastclip eval` | what |")[1].split("\n\n")[0]
    told = {name for line in table.splitlines() for name in re.findall(r"`([a-z-]+)`", line)}
    kinds = {get_args(one)[0].__name__.lower() for one in get_args(Command)} - {"list", "table"}
    assert {name.replace("-", "") for name in told} >= kinds


def test_study_commands_parse() -> None:
    found = [tyro.cli(Study, args=words[2:]) for words in commands("study")]
    assert [type(study) for study in found] == [Systems, Cifar10, All, Robustness]


def test_the_table_of_systems() -> None:
    """Its objectives exist, and its recipes train what they stand beside."""
    table = TEXT.split("| `--objective` | what |")[1].split("\n\n")[0]
    told = set()
    for line in table.splitlines()[2:]:
        objectives, _, recipes = (re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:4])
        told |= set(objectives)
        for recipe in recipes:
            flags = ["--classes", "names.txt"] if recipe == "classify_text" else []
            assert parse(["--config", recipe, *flags]).objective in objectives, recipe
    assert told == set(get_args(Objective))


def test_the_table_of_losses() -> None:
    """Its modules and functions exist, and its products are those that the tests count."""
    table = TEXT.split("| module | function")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        modules, function, _, products = (cell.strip() for cell in line.split("|")[1:5])
        for module in re.findall(r"`(\w+)`", modules):
            assert issubclass(getattr(fastclip, module), torch.nn.Module)
        (name,) = re.findall(r"`(\w+)_loss`", function)
        assert callable(getattr(fastclip.functional, f"{name}_loss"))
        assert sum(PRODUCTS[name]) == int(products.split()[0])


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in TEXT


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_the_two_commands_exist(command: str) -> None:
    assert f"./run {command}" in TEXT
    assert f"\n{command})\n" in (ROOT / "run").read_text()


def test_every_room_named_exists() -> None:
    table = TEXT.split("| room | what |")[1].split("\n\n")[0]
    for path in re.findall(r"`((?:fastclip|benchmarks|docs|kernels)/[\w/.]*)`", table):
        assert (ROOT / path).exists(), path
