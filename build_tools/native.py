"""Builds the native library with CMake into a package folder, or says there why not.

FASTCLIP_NATIVE chooses: `auto` (default) builds what this machine can and never fails an
installation, with the CUDA part where there is an nvcc that knows its architectures; `cuda` fails
it where that cannot be built; `cpu` leaves that out and fails where the rest cannot be built; `off`
builds nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "FASTCLIP_NATIVE"
CHOICES = ("auto", "off", "cpu", "cuda")
WHY_NOT = "_native_missing.txt"
"""In the package folder where there is no library; `fastclip info` shows it."""

WHY_NO_CUDA = "_native_cuda_missing.txt"
"""Likewise, where the library has no CUDA part."""
LEAST_CUDA = (12, 8)
"""The first whose nvcc knows sm_100; CMakeLists.txt has the same number."""


class CannotBuild(Exception):
    """The reason in one phrase."""


def wanted() -> str:
    """The value of FASTCLIP_NATIVE."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise SystemExit(f"{VARIABLE} is {value!r}; use one of {', '.join(CHOICES)}")
    return value


def requirements() -> list[str]:
    """What a build needs from PyPI: nothing where nothing can be built, no tool that is there."""
    if wanted() == "off" or not _compiler():
        return []
    tools = {"cmake": "cmake>=3.18", "ninja": "ninja>=1.10"}
    return [
        "pybind11>=2.13,<4",
        *(spec for tool, spec in tools.items() if not shutil.which(tool)),
    ]


def install(package: Path, version: str) -> None:
    """Leave the library, or the reason why there is none, in the folder `package`.

    Where that fails the installation, what was there stays.
    """
    choice = wanted()
    with tempfile.TemporaryDirectory(prefix="fastclip-made-") as folder:
        made = Path(folder)
        if choice == "off":
            _leave(made / WHY_NOT, f"{VARIABLE} was off: unset it")
        else:
            _build_or_report(made, version, choice)
        for old in package.glob("_native*"):
            old.unlink()
        for new in made.iterdir():
            shutil.move(new, package / new.name)


def library(package: Path) -> Path | None:
    """The library in a package folder."""
    path = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.is_file() else None


def _build_or_report(package: Path, version: str, choice: str) -> None:
    """What can be built or, unless it is asked for, the reason why that is nothing."""
    try:
        _build_most(package, version, choice)
    except (CannotBuild, OSError) as error:
        if choice != "auto":
            raise SystemExit(f"fastclip's native library: {error} ({VARIABLE}={choice})") from error
        _report(f"not built, fastclip works without: {error}")
        _leave(package / WHY_NOT, error)


def _build_most(package: Path, version: str, choice: str) -> None:
    """The library with its CUDA part or, unless that is asked for, without it and the reason."""
    try:
        if choice == "cpu":
            raise CannotBuild(f"{VARIABLE} was cpu: unset it")
        _build(package, version, _nvcc())
    except (CannotBuild, OSError) as error:
        if choice == "cuda":
            raise
        _report(f"without its CUDA part: {error}")
        _build(package, version, None)
        _leave(package / WHY_NO_CUDA, error)


def _nvcc() -> str:
    """The first nvcc that is new enough."""
    asked, home = os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME")
    at_home = [f"{home}/bin/nvcc"] if home else []
    candidates = [asked] if asked else [*at_home, "nvcc", "/usr/local/cuda/bin/nvcc"]
    least = f"{'.'.join(map(str, LEAST_CUDA))} or newer: install CUDA's toolkit, or set CUDACXX"
    reason = f"{asked or 'nvcc'} was not found; it takes {least}"
    for path in filter(None, map(shutil.which, candidates)):
        done = _listen(path, "--version")
        release = re.search(r"release (\d+\.\d+)", done.stdout)
        if release and tuple(map(int, release[1].split("."))) >= LEAST_CUDA:
            return path
        reason = f"{path} is of CUDA {release[1] if release else '?'}; it takes {least}"
    raise CannotBuild(reason)


def _build(package: Path, version: str, nvcc: str | None) -> None:
    if not _compiler():
        raise CannotBuild("no C++ compiler was found: install g++ or clang++, or set CXX")
    if not shutil.which("cmake"):
        raise CannotBuild("CMake was not found: pip install cmake")
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 was not found: pip install pybind11") from None
    # a folder of its own each time: a cache would name tools of an earlier, isolated build
    with tempfile.TemporaryDirectory(prefix="fastclip-build-") as build:
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package.resolve(),
            "FASTCLIP_MODULE": "ON",
            "FASTCLIP_TESTS": "OFF",
            "FASTCLIP_VERSION": version,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if nvcc:
            options |= {"FASTCLIP_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defined = [f"-D{name}={value}" for name, value in options.items()]
        _run("configuring", "cmake", "-S", str(ROOT), "-B", build, *generator, *defined)
        _run("compiling", "cmake", "--build", build)
        _run("installing", "cmake", "--install", build, "--strip")
    if library(package) is None:
        raise CannotBuild("CMake built no module for this Python")


def _compiler() -> bool:
    return "CXX" in os.environ or any(map(shutil.which, ("c++", "g++", "clang++")))


def _run(step: str, *command: str) -> None:
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **os.environ}
    done = _listen(*command, env=environment)
    if done.returncode:
        _report(done.stdout)
        # the compiler's or CMake's first word on it; the rest follows from that
        reason = re.split(r"error: |CMake Error[^\n]*\n", done.stdout, maxsplit=1)[-1]
        raise CannotBuild(f"{step} failed: {' '.join(reason.split())[:160]}")


def _listen(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool and take all it says, in whatever encoding."""
    return subprocess.run(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _leave(path: Path, reason: object) -> None:
    # compilers quote with more than ASCII, which not every locale can write
    path.write_text(f"{reason}\n", encoding="utf-8", errors="replace")


def _report(message: str) -> None:
    print(f"fastclip's native library: {message}", file=sys.stderr, flush=True)
