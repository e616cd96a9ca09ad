"""Wheel, sdist, checkout: each imports every module from its own files."""

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_repo_shape import ROOT, SOURCES, imports_of, module_of, tracked

IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1]).resolve()
import fastclip
assert pathlib.Path(fastclip.__file__).resolve().is_relative_to(root), fastclip.__file__
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).resolve().is_relative_to(root), module.__file__
"""


ROOMS = {"benchmarks": "bench", "kernels": "kernels"}


def module_names() -> list[str]:
    names = []
    for path in [*tracked("fastclip/*.py"), *tracked("benchmarks/*.py"), *tracked("kernels/*.py")]:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] in ROOMS:
            parts = ["fastclip", ROOMS[parts[0]], *parts[1:]]
        if parts[-1] == "__init__":
            parts.pop()
        if parts[-1] != "__main__":
            names.append(".".join(parts))
    return names


@functools.cache
def lab() -> set[str]:
    """The benchmark modules that no command imports, directly or through others."""
    paths = {module_of(path): path for path in SOURCES}
    needed: set[str] = set()
    todo = [name for name in paths if not name.startswith("fastclip.bench.")]
    while todo:
        new = imports_of(paths[todo.pop()], set(paths)) - needed
        needed |= new
        todo += new
    return {name for name in paths if name.startswith("fastclip.bench.")} - needed


def import_all(root: Path, cwd: Path, names: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(root), *names],
        cwd=cwd,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a fresh clone holds."""
    root = tmp_path_factory.mktemp("checkout")
    for path in tracked("*"):
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return root


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it; test_native_build.py compiles."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)],
        cwd=checkout,
        env={**os.environ, "FASTCLIP_NATIVE": "off"},
        check=True,
        capture_output=True,
    )
    return out


def test_checkout_imports_without_installation(checkout: Path, tmp_path: Path) -> None:
    import_all(checkout, tmp_path, module_names())


def test_wheel_imports_and_holds_the_data_files(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("fastclip_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    import_all(tmp_path / "site", tmp_path, [name for name in module_names() if name not in lab()])
    for path in [*tracked("fastclip/*"), *tracked("kernels/*")]:
        name = str(path.relative_to(ROOT))
        for folder, package in ROOMS.items():
            name = name.replace(folder, f"fastclip/{package}") if name.startswith(folder) else name
        assert name in names, f"{name} is missing in the wheel"
    for notice in ("LICENSE", "THIRD_PARTY_NOTICES.md"):
        assert any(name.endswith(f"licenses/{notice}") for name in names)
    assert wheel.stat().st_size <= 5e6, "a wheel is downloaded by everyone"
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastclip"}


def test_wheel_holds_the_benchmarks_that_commands_import(built: Path) -> None:
    (wheel,) = built.glob("fastclip_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {
            name.removesuffix(".py").replace("/", ".")
            for name in archive.namelist()
            if name.startswith("fastclip/bench/") and name != "fastclip/bench/__init__.py"
        }
    every = {module_of(path) for path in tracked("benchmarks/*.py")}
    assert "fastclip.bench.gpu_lab" in lab() and "fastclip.bench.losses" not in lab()
    assert found == every - lab()


def test_sdist_holds_what_the_native_part_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in [*tracked("csrc/*"), *tracked("build_tools/*"), ROOT / "CMakeLists.txt"]:
        assert str(path.relative_to(ROOT)) in names


def test_editable_installation_finds_the_top_level_rooms(tmp_path: Path) -> None:
    """The test environment itself is an editable installation."""
    code = """
import fastclip.bench.runner as bench, fastclip.kernels.launch as kernels
print(bench.__file__, kernels.__file__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wanted = [ROOT / "benchmarks" / "runner.py", ROOT / "kernels" / "launch.py"]
    assert [Path(name) for name in result.stdout.split()] == wanted


def test_importing_fastclip_needs_only_torch(tmp_path: Path) -> None:
    code = """
import sys
for name in ("open_clip", "timm", "torchvision", "tyro", "yaml", "PIL", "tqdm", "matplotlib",
             "tensorboard", "braceexpand", "transformers", "triton", "numpy"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch, fastclip
x = torch.eye(4)
assert fastclip.ClipLoss()(x, x, 10.0) < fastclip.functional.clip_loss(x, x.flip(0), 10.0)
for name in ("SigLipLoss", "MPNCELoss", "InfoNCELoss", "NTXentLoss", "SupConLoss"):
    assert isinstance(getattr(fastclip, name)(), torch.nn.Module)
from fastclip.cli import main
assert main(["info"]) == 0
assert main(["train"]) == 1
try:
    fastclip.load
except ModuleNotFoundError as error:
    assert error.name in sys.modules and sys.modules[error.name] is None
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "pip install 'fastclip-kernels[train]'" in result.stderr
    assert "fastclip.load needs the package '" in result.stdout
    assert "pip install 'fastclip-kernels[train]'" in result.stdout


def test_a_loss_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    code = """
import sys, torch, fastclip
x = torch.eye(4, requires_grad=True)
fastclip.ClipLoss()(x, x, 10.0).backward()
print("torch._dynamo" in sys.modules)
from fastclip.ops.compiling import constant_in_graphs
def marks(mark):
    def function(): pass
    return vars(mark(function))
print(marks(constant_in_graphs) == marks(torch.compiler.assume_constant_result))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True"]
