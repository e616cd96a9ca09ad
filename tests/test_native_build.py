"""The native part's build: what is chosen, what is refused, and its own tests under sanitizers."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastclip import __version__, native
from tests.test_packaging import checkout
from tests.test_repo_shape import ROOT

__all__ = ["checkout"]

EVERY_TOOL = {"c++", "cmake", "ninja"}
COMPILER = any(map(shutil.which, ("c++", "g++", "clang++"))) and shutil.which("cmake")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler or no CMake is installed")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    monkeypatch.delenv("FASTCLIP_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    # a name of its own: `native` is not the package's
    spec = importlib.util.spec_from_file_location(
        "build_tools_native", ROOT / "build_tools" / "native.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only(names: set[str]) -> Callable[[str], str | None]:
    return lambda name: f"/usr/bin/{name}" if name in names else None


def reason_of(folder: Path) -> str:
    return (folder / "_native_missing.txt").read_text().strip()


def test_nothing_is_required_where_nothing_can_be_built(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for present, wanted in (
        (set(), []),
        ({"cmake", "ninja"}, []),
        (EVERY_TOOL, ["pybind11"]),
        ({"clang++"}, ["pybind11", "cmake", "ninja"]),
    ):
        monkeypatch.setattr(shutil, "which", only(present))
        assert [spec.partition(">")[0] for spec in tools.requirements()] == wanted
    monkeypatch.setenv("FASTCLIP_NATIVE", "off")
    assert tools.requirements() == []


def test_auto_never_fails_and_says_why(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    stale = tmp_path / "_native.cpython-39-x86_64-linux-gnu.so"
    for missing, message in (
        (EVERY_TOOL, "no C++ compiler was found: install g++ or clang++, or set CXX"),
        ({"cmake"}, "CMake was not found: pip install cmake"),
    ):
        stale.touch()
        monkeypatch.setattr(shutil, "which", only(EVERY_TOOL - missing))
        tools.install(tmp_path, "1")
        assert reason_of(tmp_path) == message
        assert message in capfd.readouterr().err
        assert not stale.exists()
        monkeypatch.setenv("FASTCLIP_NATIVE", "cpu")
        with pytest.raises(SystemExit, match="FASTCLIP_NATIVE=cpu"):
            tools.install(tmp_path, "1")
        monkeypatch.setenv("FASTCLIP_NATIVE", "auto")
    monkeypatch.setenv("FASTCLIP_NATIVE", "off")
    tools.install(tmp_path, "1")
    assert reason_of(tmp_path) == "FASTCLIP_NATIVE was off: unset it"
    monkeypatch.setenv("FASTCLIP_NATIVE", "yes")
    with pytest.raises(SystemExit, match="'yes'; use one of auto, off, cpu, cuda"):
        tools.install(tmp_path, "1")


@needs_compiler
def test_a_broken_compiler_is_reported_not_fatal(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    monkeypatch.setenv("CXX", "/bin/false")
    tools.install(tmp_path, "1")
    assert 'configuring failed: The C++ compiler "/bin/false"' in reason_of(tmp_path)


def test_a_reason_in_any_encoding_is_reported_not_fatal(tmp_path: Path) -> None:
    """Compilers quote with more than ASCII; a locale may decode and write nothing but that."""
    code = (
        "import native, pathlib\n"
        "say = r\"printf 'error: \\351 \\342\\200\\230x'; exit 1\"\n"
        "native._build = lambda *_: native._run('compiling', 'sh', '-c', say)\n"
        "native.install(pathlib.Path('.'), '1')\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = {"PYTHONPATH": str(ROOT / "build_tools"), "FASTCLIP_NATIVE": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **plain, **path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    message = (tmp_path / "_native_missing.txt").read_text(encoding="utf-8")
    assert message.startswith("compiling failed: ")


@pytest.mark.parametrize(
    "found, files, message",
    [
        (
            SimpleNamespace(VERSION="0.0.1", ABI=native.ABI),
            {},
            f"of fastclip 0.0.1, interface {native.ABI}",
        ),
        (SimpleNamespace(VERSION=__version__, ABI=99), {}, "interface 99; this is"),
        (ImportError("no"), {}, "it is not built: pip install again"),
        (ImportError("no"), {"_native_missing.txt": "no cmake\n"}, "it is not built: no cmake"),
        (ImportError("no"), {"_native.cpython-39-x.so": ""}, "-39-x.so is of another Python"),
        (ImportError("bad ELF"), {"_native.so": ""}, r"it does not load \(bad ELF\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    found: object,
    files: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def load(name: str) -> object:
        if isinstance(found, Exception):
            raise found
        return found

    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.delenv("FASTCLIP_NATIVE", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native.importlib, "import_module", load)
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    with pytest.raises(native.Unusable, match=message):
        native.library()
    assert native.unavailable_reason()


def test_a_stale_library_is_reported_by_info_and_not_used(checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / "fastclip", tmp_path / "fastclip")
    (tmp_path / "fastclip" / "_native.py").write_text("VERSION, ABI = '0.0.1', 1\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("FASTCLIP_NATIVE", None)
    done = subprocess.run(
        [sys.executable, "-m", "fastclip.cli", "info"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("losses on this machine use: torch\n")
    assert "  cpu                  it is of fastclip 0.0.1" in done.stdout
    assert "    cpp                not available: it is of fastclip 0.0.1" in done.stdout
    assert "    torch              used" in done.stdout


@needs_compiler
@pytest.mark.slow
def test_a_wheel_with_the_library_is_of_this_machine(checkout: Path, tmp_path: Path) -> None:
    """Built, unpacked, used; the same files with FASTCLIP_NATIVE=off are not."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run(
        [*command, "--skip-dependency-check", "--outdir", str(tmp_path)],
        cwd=checkout,
        env={**os.environ, "FASTCLIP_NATIVE": "cpu"},
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from fastclip import native; print(native.unavailable_reason(), native.__file__)"
    for choice, message in (("auto", "None"), ("off", "FASTCLIP_NATIVE is off")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "FASTCLIP_NATIVE": choice},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(f"{message} {tmp_path / 'site'}")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["", "address", "thread"], ids=lambda name: name or "plain")
def test_the_library_alone(sanitizer: str, tmp_path: Path) -> None:
    """Its C++ tests, as CMake builds and ctest runs them."""
    options = [f"-DFASTCLIP_SANITIZE={sanitizer}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options],
        ["cmake", "--build", str(tmp_path), "--parallel"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if "cannot find" in done.stderr + done.stdout and "san" in done.stderr + done.stdout:
            pytest.skip(f"the compiler has no -fsanitize={sanitizer} here")
        assert done.returncode == 0, done.stdout + done.stderr
