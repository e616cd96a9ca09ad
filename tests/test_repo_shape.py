"""The layout's rules: room sizes, the direction of imports, what must never be there."""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports go from a higher rank to a lower or equal one.
RANKS = {
    **dict.fromkeys(("_version", "atomic", "bounded", "command_line", "flags"), 0),
    **dict.fromkeys(("messages", "printable", "screen"), 0),
    **dict.fromkeys(("device", "native", "kernels"), 0),
    "ops": 1,
    **dict.fromkeys(("functional", "losses", "nn"), 2),
    **dict.fromkeys(("integrations", "data"), 3),
    "models": 4,
    "evaluate": 5,
    "train": 6,
    **dict.fromkeys(("study", "bench"), 7),
    "cli": 8,
}


def tracked(pattern: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).exists()]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] in ("benchmarks", "kernels"):
        return "bench" if parts[0] == "benchmarks" else "kernels"
    return parts[1].removesuffix(".py")


SOURCES = [
    path
    for path in [*tracked("fastclip/*.py"), *tracked("benchmarks/*.py"), *tracked("kernels/*.py")]
    if path != ROOT / "fastclip" / "__init__.py"
]


def test_file_sizes() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in tracked("*.py")}
    assert statistics.median(lengths.values()) <= 200
    lengths |= {path: len(path.read_text().splitlines()) for path in tracked("csrc/*")}
    assert max(lengths.values()) <= 700, max(lengths, key=lengths.__getitem__)


def test_operators_take_few_arguments() -> None:
    """Options travel as a record; only public signatures spell them all out."""
    for path in tracked("fastclip/ops/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                is_public = "Args:" in (ast.get_docstring(node) or "")
                assert count <= 12 or is_public, f"{path.name}: {node.name} has {count}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    rank = RANKS[room_of(path)]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastclip" and len(parts) > 1 and parts[1] in RANKS:
                assert RANKS[parts[1]] <= rank, f"{name} is above {room_of(path)}"


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    where = {"benchmarks": ["fastclip", "bench"], "kernels": ["fastclip", "kernels"]}
    parts = where.get(parts[0], parts[:1]) + parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """What a file imports of these modules, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {str(node.module)}
    return found & modules - {module_of(path)}


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, on whatever way round."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = imports[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in imports}
    found = [{other for other in reach[m] if m in reach[other]} for m in imports]
    return [
        circle for number, circle in enumerate(found) if circle and circle not in found[:number]
    ]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [{"b", "c"}]


def test_no_circle_of_imports() -> None:
    modules = {module_of(path): path for path in SOURCES}
    imports = {name: imports_of(path, set(modules)) for name, path in modules.items()}
    assert "fastclip.train.zero" in imports["fastclip.train.select_engine"]
    assert circles(imports) == []


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function, its docstring apart."""
    first = function.body[0]
    assert function.end_lineno is not None and first.end_lineno is not None
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_functions_of_the_trainer_are_short() -> None:
    lengths = {
        f"{path.name}: {node.name}": lines_of(node)
        for path in tracked("fastclip/train/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_rooms_have_contents() -> None:
    for init in tracked("fastclip/**/__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text())), init
        siblings = [p for p in init.parent.rglob("*") if p.is_file() and p != init]
        assert siblings or init.parent.name in ("bench", "kernels"), f"{init.parent} is empty"
    # a regular package of this name would shadow Hugging Face's `kernels` and break transformers
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", ["data", "train"])
def test_the_map_of_a_room_is_whole(room: str) -> None:
    folder = ROOT / "fastclip" / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    # the second column may name commands
    listed = re.findall(r"`(\w+)`", re.sub(r"\|[^|]*\|$", "", text, flags=re.MULTILINE))
    found = {
        path.relative_to(folder).parts[0].removesuffix(".py")
        for path in tracked(f"fastclip/{room}/*.py")
    }
    assert sorted(listed) == sorted(found - {"__init__"})


def test_every_module_and_public_function_is_documented() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                # a kernel file's docstring explains its kernels, formula and shapes
                if not node.name.endswith("_kernel"):
                    assert ast.get_docstring(node), f"{path}: {node.name}"


def test_processes_leave_together() -> None:
    """One that leaves its group alone closes the others' connections in their last exchange."""
    leaving = r"(.*)\n +(?:torch\.distributed|dist)\.destroy_process_group\(\)\n"
    starting = r"spawn\(|start_processes\(|on_ranks\("
    several = [
        (path, before)
        for where in ("tests/**/*.py", "benchmarks/*.py", "examples/*.py")
        for path in tracked(where)
        if where.startswith("examples") or re.search(starting, path.read_text())
        for before in re.findall(leaving, path.read_text())
    ]
    assert len(several) > 10
    assert [str(path) for path, before in several if not before.endswith(".barrier()")] == []


def test_kernels_import_nothing_of_the_package_but_kernels() -> None:
    for path in tracked("kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastclip"):
                assert (node.module or "").startswith("fastclip.kernels"), path


def test_csrc_sees_nothing_of_torch_and_the_loader_alone_sees_it() -> None:
    for path in tracked("csrc/*"):
        included = re.findall(r"#include [<\"](.+)[>\"]", path.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10|caffe2)/", name)], path
        if path.name != "bindings.cpp":
            assert not [name for name in included if re.match(r"pybind11|Python", name)], path
    users = [path.name for path in SOURCES if "fastclip._native" in path.read_text()]
    assert users == ["native.py"]
