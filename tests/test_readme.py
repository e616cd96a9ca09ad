"""What the README shows works as it stands."""

import re
import shlex

import pytest
import torch
import tyro

import fastclip
from fastclip.cli.bench import BenchConfig
from fastclip.cli.plan import PlanConfig
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


def commands(name: str) -> list[list[str]]:
    """The words of every `fastclip NAME ...` in a shell block."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[:2] == ["fastclip", name]]


def test_train_commands_parse() -> None:
    found = commands("train")
    assert len(found) == 3
    for words in found:
        assert parse([word for word in words[2:] if word != "..."]).name in ("first", "cifar10")


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
    found = commands("bench")
    assert len(found) == 2
    for words in found:
        assert tyro.cli(BenchConfig, args=words[2:]).what == "losses"


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
