"""What the README shows works as it stands."""

import re
import shlex

import pytest
import torch

from fastclip.train.config import parse
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


def test_train_commands_parse() -> None:
    commands = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in commands]
    found = [words for words in found if words[:2] == ["fastclip", "train"]]
    assert len(found) == 3
    for words in found:
        assert parse([word for word in words[2:] if word != "..."]).name in ("first", "cifar10")


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in TEXT


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_the_two_commands_exist(command: str) -> None:
    assert f"./run {command}" in TEXT
    assert f"\n{command})\n" in (ROOT / "run").read_text()


def test_every_room_named_exists() -> None:
    table = TEXT.split("| room | what |")[1].split("\n\n")[0]
    for path in re.findall(r"`((?:fastclip|benchmarks|docs)/[\w/.]*)`", table):
        assert (ROOT / path).exists(), path
