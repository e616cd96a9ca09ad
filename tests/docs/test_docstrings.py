"""Docstrings of public names stand alone, describe every parameter, and their examples run."""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.test_api import ENTRIES
from tests.test_repo_shape import ROOT

# why their examples are shown but not run here
NOT_RUN = {"fastclip.data.dali.DaliLoader": "needs NVIDIA DALI"}
ELSEWHERE = re.compile(r"(?i)see the (module|class)|see `fastclip\.\w+`|further arguments")
REFERENCE = re.compile(r"(?i)(see|as|like|likewise|those of)\b.*`")
ITEM = re.compile(r"    ([*\w]+(?:, [*\w]+)*):\s+(.*)")


def exported() -> Iterator[str]:
    """What modules name in `__all__`."""
    for path in sorted((ROOT / "fastclip").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                for name in ast.literal_eval(node.value):
                    yield f"{module.removesuffix('.__init__')}.{name}"


def public() -> dict[str, Any]:
    """Every public function and class, by where it is defined."""
    found = {}
    for name in [*(entry.name for entry in ENTRIES), *exported()]:
        module, _, last = name.rpartition(".")
        one = getattr(importlib.import_module(module), last)
        if inspect.isclass(one) or inspect.isfunction(one):
            found[f"{one.__module__}.{one.__qualname__}"] = one
    return found


def callables() -> Iterator[tuple[str, Any, str]]:
    """Their names, and those of their public methods, what is called, and its docstring."""
    for name, one in PUBLIC.items():
        yield name, one, inspect.getdoc(one) or ""
        for attribute, member in vars(one).items() if inspect.isclass(one) else ():
            method = getattr(member, "__func__", member)
            if inspect.isfunction(method) and attribute[0] != "_" and method.__doc__:
                yield f"{name}.{attribute}", getattr(one, attribute), inspect.getdoc(method) or ""


def described(docstring: str, *sections: str) -> dict[str, str]:
    """What each name of the sections is."""
    found, inside = {}, False
    for line in docstring.splitlines():
        if re.match(r"\S", line):
            inside = line in sections
        elif inside and (item := ITEM.fullmatch(line)):
            found |= dict.fromkeys(item[1].split(", "), item[2])
    return found


PUBLIC = public()
CALLABLES = list(callables())
MODULES = sorted({one.__module__ for one in PUBLIC.values()})


def examples(name: str, one: Any) -> doctest.DocTest:
    """The examples of a docstring, in a namespace of their own."""
    place = Path(inspect.getsourcefile(one) or "").name
    docstring, line = inspect.getdoc(one) or "", inspect.getsourcelines(one)[1]
    return doctest.DocTestParser().get_doctest(docstring, {"__name__": name}, name, place, line)


def test_every_room_is_looked_at() -> None:
    rooms = {name.split(".")[1] for name in PUBLIC}
    assert rooms >= {"functional", "ops", "losses", "nn", "integrations", "data", "models", "train"}
    assert set(PUBLIC) >= set(NOT_RUN)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_examples(name: str) -> None:
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    assert re.search(r"(?m)^Examples:\n(    .*\n?|\n)+\Z", docstring), "its end are no examples"
    given = examples(name, PUBLIC[name]).examples
    assert given
    assert any(doctest.SKIP in one.options for one in given) == (name in NOT_RUN)


@pytest.mark.parametrize(("name", "call", "docstring"), CALLABLES, ids=[c[0] for c in CALLABLES])
def test_it_stands_alone(name: str, call: Any, docstring: str) -> None:
    assert not ELSEWHERE.search(docstring), f"{name} sends its reader elsewhere"
    of_arguments = described(docstring, "Args:", "Attributes:")
    parameters = inspect.signature(call).parameters
    assert described(docstring, "Args:").keys() <= parameters.keys(), "there is no such argument"
    for argument in parameters:
        if argument not in ("self", "cls"):
            assert argument in of_arguments, f"{name}: {argument} is not described"
            text = of_arguments[argument]
            assert not REFERENCE.match(text), f"{name}: {argument} is only referred to: {text}"


@pytest.mark.parametrize("module", MODULES)
def test_its_examples_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    with torch.random.fork_rng():
        for name, one in PUBLIC.items():
            if one.__module__ == module:
                runner.run(examples(name, one))
    assert not runner.failures, capsys.readouterr().out
