"""Every command on a page is one: the real parsers take it, and what it names exists."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro

from fastclip import cli
from fastclip.train.config import parse
from fastclip.train.open_clip_flags import FLAGS
from tests.docs.pages import READ, Page
from tests.test_repo_shape import ROOT, tracked

SOURCES = "".join(
    path.read_text()
    for pattern in ("*.py", "*.cpp", "CMakeLists.txt", "*.sh", "run")
    for path in tracked(pattern)
    if not str(path.relative_to(ROOT)).startswith(("docs/", "tests/docs/"))
)
COMMANDS = [(page, words) for page in READ for words in page.commands()]
# other programs' flags that the prose names
FOREIGN = {"help", "logdir", "shm-size", *(flag.name for flag in FLAGS if flag.status != "same")}


class Parsed(BaseException):
    """What a command's parser made of its arguments."""

    def __init__(self, config: Any) -> None:
        self.config = config


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], Any]:
    """A command line to its configuration, by the command's own parser; nothing is run."""
    real = tyro.cli

    def stop(*arguments: Any, **options: Any) -> Any:
        raise Parsed(real(*arguments, **options))

    def parse_only(words: Sequence[str]) -> Any:
        if list(words) == ["info"] or "--help" in words:
            assert words[0] in cli.COMMANDS
            return None
        with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
            patch.setattr(tyro, "cli", stop)
            cli.main(list(words))
        return caught.value.config

    return parse_only


def _fastclip(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    parsed(words[1:])


def _launcher(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    """torchrun or deepspeed: a script here, or a command of fastclip's."""
    if "fastclip.cli" in words:
        config = parsed(words[words.index("fastclip.cli") + 1 :])
        if words[0] == "deepspeed":
            given = any(getattr(part, "deepspeed", False) for part in vars(config).values())
            assert given, "started by deepspeed, but without --deepspeed"
        return
    _script(words, parsed)


def _script(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    """A file of the repository, or a program of the user's, which the text calls so."""
    scripts = [word for word in words[1:] if re.search(r"\.(py|sh|sbatch)$", word)]
    assert scripts, words
    for script in scripts:
        assert script == "your_script.py" or (ROOT / script).is_file(), script
    if scripts[0].endswith(".sbatch"):
        parse(words[words.index(scripts[0]) + 1 :])


def _module(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    if words[1] == "-m":
        assert words[2] in ("pip", "venv", "pytest") or importlib.util.find_spec(words[2])
    elif words[1] != "-c":
        _script(words, parsed)


def _pip(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert words[1] in ("install", "uninstall")
    for word in words[2:]:
        for extras in re.findall(r"(?:\.|fastclip-kernels)\[(.+)\]", word):
            for extra in extras.split(","):
                assert f"\n{extra} = [" in text, extra


def _run(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    assert f"\n{words[1]})\n" in (ROOT / "run").read_text()


def _file(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    assert (ROOT / words[0]).is_file()


def _checked(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    """A command under a tool that watches it."""
    TOOLS[words[1]](words[1:], parsed)


def _plain(words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    """Programs of the system's, which are not ours to parse."""


TOOLS: dict[str, Callable[[list[str], Callable[[Sequence[str]], Any]], None]] = {
    "fastclip": _fastclip,
    **dict.fromkeys(("torchrun", "deepspeed"), _launcher),
    "sbatch": _script,
    "python": _module,
    "pip": _pip,
    "./run": _run,
    **dict.fromkeys(("benchmarks/gpu_lab.sh", "benchmarks/page_figures.sh"), _file),
    "compute-sanitizer": _checked,
    **dict.fromkeys(("git", "cd", ".", "cmake", "ctest", "pytest"), _plain),
}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:70]}" for page, words in COMMANDS]
)
def test_it_parses(page: Page, words: list[str], parsed: Callable[[Sequence[str]], Any]) -> None:
    while "=" in words[0]:
        variable = words[0].partition("=")[0]
        assert variable in SOURCES, f"{variable} is read nowhere"
        words = words[1:]
    # a command that is cut short with dots
    words = [word for word in words if word != "..."]
    assert words[0] in TOOLS, f"{words[0]} is not a known tool; add it to TOOLS"
    TOOLS[words[0]](words, parsed)


def test_every_command_is_shown() -> None:
    shown = {words[1] for _, words in COMMANDS if words[0] == "fastclip"}
    assert shown >= set(cli.COMMANDS) - {"quickstart"}
    assert any(words[:2] == ["./run", "quickstart"] for _, words in COMMANDS)


def _own_flags() -> set[str]:
    """Every field of every configuration of the command line, and what argparse defines."""
    flags = set(re.findall(r'add_argument\(\s*"--([\w-]+)"', SOURCES))
    folders = [ROOT / "fastclip" / "cli", ROOT / "fastclip" / "cli" / "eval"]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in folders
        for path in folder.glob("*.py")
        if path.stem != "__main__"
    ]
    for name in (*modules, "fastclip.train.config", "fastclip.data.options"):
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                flags |= {field.name for field in dataclasses.fields(value)}
    return {flag.replace("-", "_") for flag in flags} | {"config"}


OWN_FLAGS = _own_flags()


@pytest.mark.parametrize("page", READ, ids=str)
def test_flags_spoken_of_exist(page: Page) -> None:
    for span in re.findall(r"`([^`\n]+)`", page.prose):
        for flag in re.findall(r"(?:^|\s)--([a-zA-Z][\w-]*)", span):
            name = flag.replace("-", "_")
            known = name in OWN_FLAGS or name.removeprefix("no_") in OWN_FLAGS
            assert known or flag in FOREIGN, f"{page}: --{flag}"


@pytest.mark.parametrize("page", READ, ids=str)
def test_paths_spoken_of_exist(page: Page) -> None:
    """Those that begin in a room of the repository."""
    rooms = "fastclip|benchmarks|docs|kernels|csrc|tests|examples|build_tools"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*)`", page.prose):
        assert (ROOT / path).exists() or (Path(ROOT / path).parent.is_dir() and "*" in path), path
