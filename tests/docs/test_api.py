"""The API reference is what the docstrings say, and they say what a caller needs."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

import fastclip
from tests.test_repo_shape import ROOT


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    importlib.util.sys.modules["make_api"] = module
    spec.loader.exec_module(module)
    return module


API = _generator()
ENTRIES = API.entries()
# said once for all of them, at the head of their module or class
SHARED = {"backend", "chunk_bytes", "precision", "dist", "group", "sizes", "self", "cls"}


def functions() -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Every public function and method: its name, what documents it, and its definition."""
    for entry in ENTRIES:
        node = entry.definition
        if isinstance(node, ast.FunctionDef):
            yield entry.name, ast.get_docstring(node) or "", node
            continue
        of_class = ast.get_docstring(node) or ""
        init = API.constructor(node)
        if init is not None:
            yield entry.name, of_class, init
        for method in API.methods(node):
            own = ast.get_docstring(method) or ""
            yield f"{entry.name}.{method.name}", f"{own}\n{of_class}", method


FUNCTIONS = list(functions())
# in the data room a random state or a size speaks for itself
CHECKED = [one for one in FUNCTIONS if not one[0].startswith("fastclip.data.")]


def test_the_page_is_what_the_docstrings_say() -> None:
    assert API.PAGE.read_text() == API.page(), "run python docs/make_api.py"


def test_examples_are_blocks_of_code() -> None:
    """Markdown takes an indented line after text for its continuation."""
    blocks = re.findall(r"(?ms)^```pycon\n(.*?)^```$", API.page())
    assert sum(block.count(">>>") for block in blocks) == API.page().count(">>>") > 0


def test_every_public_name_is_in_it() -> None:
    listed = {entry.name for entry in ENTRIES}
    assert listed >= {f"fastclip.{name}" for name in fastclip.__all__} - {
        "fastclip.functional",
        "fastclip.__version__",
    }
    for room in ("losses", "nn"):
        for path in sorted((ROOT / "fastclip" / room).glob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, API.Definition) and not node.name.startswith("_"):
                    module = f"fastclip.{room}.{path.stem}"
                    homes = {(e.module, e.name.rpartition(".")[2]) for e in ENTRIES}
                    assert (module, node.name) in homes, f"{module}.{node.name}"


def test_every_loss_function_is_in_it() -> None:
    listed = {entry.name for entry in ENTRIES}
    for name in fastclip.functional.__all__:
        if inspect.isfunction(getattr(fastclip.functional, name)):
            assert f"fastclip.functional.{name}" in listed


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_it_has_a_first_line(entry: object) -> None:
    docstring = ast.get_docstring(entry.definition)  # type: ignore[attr-defined]
    first = (docstring or "").split("\n\n")[0]
    assert re.search(r"[.:]$", first.strip()), first


@pytest.mark.parametrize(
    ("name", "docstring", "node"), CHECKED, ids=[name for name, _, _ in CHECKED]
)
def test_its_arguments_are_reported(name: str, docstring: str, node: ast.FunctionDef) -> None:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    for argument in arguments:
        if argument.arg not in SHARED and "further arguments" not in docstring:
            assert re.search(rf"(?i)\b{argument.arg}\b", docstring), f"{name}: {argument.arg}"
        # a module's layers have their weights' shapes
        if argument.annotation is not None and "Tensor" in ast.unparse(argument.annotation):
            assert re.search(r"\(\w+,|0-d|shape", docstring), f"{name}: shape of {argument.arg}"


@pytest.mark.parametrize(
    ("name", "docstring", "node"), FUNCTIONS, ids=[name for name, _, _ in FUNCTIONS]
)
def test_its_errors_are_reported(name: str, docstring: str, node: ast.FunctionDef) -> None:
    """Where it raises, or calls one of the checks, itself."""
    called = {
        ast.unparse(call.func).rpartition(".")[2]
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
    }
    checks = {one for one in called if re.match(r"_?(check|demand|require)_", one)} | (
        called & {"_ranks", "_check", "_check_blocks", "_check_alike"}
    )
    raises = [one for one in ast.walk(node) if isinstance(one, ast.Raise) and one.exc is not None]
    if raises or checks:
        assert "Raises:" in docstring, f"{name}: {sorted(checks) or ast.unparse(raises[0])}"
