"""The native library's CUDA part: which nvcc is taken, what it makes, what is said without one."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastclip import __version__, native
from fastclip.cli import main
from fastclip.device import driver_is_installed
from fastclip.ops import backend
from tests.test_native_build import needs_compiler, tools
from tests.test_repo_shape import ROOT

__all__ = ["tools"]

# of 65536 in a multiprocessor, for blocks of 256 threads: two blocks at least are there at a time,
# sixteen warps, each with eight loads under way
MOST_REGISTERS = 128
STATIC_SHARED_BYTES = 48 << 10
KERNELS = (
    "statistics",
    "begin_rows",
    "merge",
    "end_rows",
    "gradient",
    "sigmoid",
    "finish",
    "row_dot",
)


def put_nvcc(folder: Path, release: str) -> Path:
    """Something that says it is nvcc of a release."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_cuda(tools: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The build tool where no CUDA is installed."""
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    find = shutil.which
    hidden = "/usr/local/cuda/bin/nvcc"
    monkeypatch.setattr(shutil, "which", lambda name: None if name == hidden else find(name))
    return tools


def test_the_first_nvcc_that_is_new_enough_is_taken(
    no_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(no_cuda.CannotBuild, match=r"nvcc was not found; it takes 12\.8 or newer"):
        no_cuda._nvcc()
    on_path = put_nvcc(tmp_path / "path", "12.9")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert no_cuda._nvcc() == str(on_path)
    old = put_nvcc(tmp_path / "old", "12.6")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    assert no_cuda._nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_HOME", str(put_nvcc(tmp_path / "new", "13.0").parents[1]))
    assert no_cuda._nvcc() == str(tmp_path / "new" / "bin" / "nvcc")
    # what is asked for by name is taken or refused
    monkeypatch.setenv("CUDACXX", str(old))
    with pytest.raises(no_cuda.CannotBuild, match=r"nvcc is of CUDA 12\.6; it takes 12\.8"):
        no_cuda._nvcc()


def test_one_least_version_of_nvcc(tools: ModuleType) -> None:
    least = ".".join(map(str, tools.LEAST_CUDA))
    assert f"CUDAToolkit {least} REQUIRED" in (ROOT / "CMakeLists.txt").read_text()
    assert f"nvcc {least} or newer" in native.HOW_TO_BUILD_CUDA


def test_a_failing_cuda_part_leaves_the_rest_and_its_reason(
    no_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[str | None] = []

    def build(package: Path, version: str, nvcc: str | None) -> None:
        built.append(nvcc)
        if nvcc:
            raise no_cuda.CannotBuild("compiling failed: no kernel image")

    monkeypatch.setattr(no_cuda, "_build", build)
    message = tmp_path / "_native_cuda_missing.txt"
    no_cuda.install(tmp_path, "1")
    assert built == [None] and "nvcc was not found" in message.read_text()
    nvcc = str(put_nvcc(tmp_path / "path", "13.0"))
    monkeypatch.setenv("CUDACXX", nvcc)
    no_cuda.install(tmp_path, "1")
    assert (
        built[1:] == [nvcc, None] and message.read_text() == "compiling failed: no kernel image\n"
    )
    assert not (tmp_path / "_native_missing.txt").exists()
    monkeypatch.setenv("FASTCLIP_NATIVE", "cpu")
    no_cuda.install(tmp_path, "1")
    assert built[3:] == [None] and message.read_text() == "FASTCLIP_NATIVE was cpu: unset it\n"
    monkeypatch.setenv("FASTCLIP_NATIVE", "cuda")
    with pytest.raises(SystemExit, match=r"no kernel image \(FASTCLIP_NATIVE=cuda\)"):
        no_cuda.install(tmp_path, "1")
    assert built[4:] == [nvcc]
    # what was there stays
    assert message.read_text() == "FASTCLIP_NATIVE was cpu: unset it\n"


@needs_compiler
def test_an_nvcc_that_breaks_is_reported_not_fatal(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    nvcc = put_nvcc(tmp_path / "broken", "13.0")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    package = tmp_path / "package"
    package.mkdir()
    build = tools._build

    def build_cuda_alone(package: Path, version: str, nvcc: str | None) -> None:
        # a whole build without nvcc is `test_native_build.py`'s
        if nvcc is None:
            (package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
        else:
            build(package, version, nvcc)

    monkeypatch.setattr(tools, "_build", build_cuda_alone)
    tools.install(package, "1")
    assert tools.library(package)
    message = (package / "_native_cuda_missing.txt").read_text()
    assert message.startswith("configuring failed: ")


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc is installed: nothing is compiled")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with its CUDA part, in a folder of its own."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import native, pathlib; "
        "native.install(pathlib.Path(sys.argv[2]), sys.argv[3])"
    )
    environment = {**os.environ, "FASTCLIP_NATIVE": "cuda"}
    command = [sys.executable, "-c", code, str(ROOT / "build_tools"), str(folder), __version__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (library,) = folder.iterdir()
    return library


@needs_nvcc
@pytest.mark.slow
def test_what_ptxas_made(tmp_path: Path) -> None:
    """Nothing spilled, on any architecture; enough registers left for two blocks at a time."""
    description = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(r"CMAKE_CUDA_ARCHITECTURES ([\w -]+)\)", description)[1]
    wanted = [f"sm_{name.partition('-')[0]}" for name in listed.split()]
    assert wanted == ["sm_80", "sm_90", "sm_100"] and not listed.endswith("-real")
    codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in wanted]
    seen: dict[str, list[str]] = {name: [] for name in wanted}
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}", *codes, "-Xptxas=-v", "-c"]
        command = [NVCC, *flags, str(source), "-o", str(tmp_path / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout + done.stderr, done.stderr
        message = re.split(
            r"Compiling entry function '(\w+)' for '(\w+)'", done.stdout + done.stderr
        )
        for name, architecture, text in zip(
            message[1::3], message[2::3], message[3::3], strict=True
        ):
            context = f"{name} for {architecture}: {text}"
            registers = re.search(r"Used (\d+) registers", text)
            shared = re.search(r"(\d+) bytes smem", text)
            nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
            assert re.search(rf"\b{nothing}", text), context
            assert registers and int(registers[1]) <= MOST_REGISTERS, context
            assert not shared or int(shared[1]) <= STATIC_SHARED_BYTES, context
            seen[architecture].append(name)
    assert len({tuple(sorted(names)) for names in seen.values()}) == 1
    for kernel in KERNELS:
        assert any(f"{kernel}_kernel" in name for name in seen["sm_80"]), kernel


@needs_nvcc
@pytest.mark.slow
def test_a_lane_moves_four_entries_at_a_time(tmp_path: Path) -> None:
    """A load and a store for each of its eight rows, beside those of a tile's edges."""
    source, ptx = ROOT / "csrc" / "cuda" / "epilogues.cu", tmp_path / "out.ptx"
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}", "-arch=compute_80", "-ptx"]
    subprocess.run([NVCC, *flags, str(source), "-o", str(ptx)], check=True)
    kernels = re.findall(r"\.entry (\w+)(.*?)^}", ptx.read_text(), re.DOTALL | re.MULTILINE)
    sweeps = [(name, text) for name, text in kernels if "merge" not in name]
    assert len(sweeps) == len(kernels) - 1 == 21
    for name, text in sweeps:
        reads_only = re.search("statistics_kernel|sigmoid_kernelILb0", name)
        assert len(re.findall(r"ld\.global[\w.]*\.v4\.", text)) == 8, name
        # 16 where one of two ways is taken
        stores = len(re.findall(r"st\.global[\w.]*\.v[24]\.", text))
        assert stores == 0 if reads_only else stores in (8, 16), name
        # one instruction: nothing is done about what would be below the normal numbers
        assert "ex2.approx.ftz" in text and "ex2.approx.f32" not in text, name


@needs_nvcc
@needs_compiler
@pytest.mark.slow
def test_the_module_loads_without_cuda(built: Path) -> None:
    """CUDA's runtime is inside; a launch that fails names the kernel in CUDA's own words."""
    code = (
        "import _native; cuda = _native.cuda\n"
        "print(cuda.EMULATED, cuda.driver_unavailable_reason())\n"
        "try: cuda.merge((1, 4, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0), 0, 0, 0, 0)\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=built.parent, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first.startswith("False ")
    if not driver_is_installed():
        assert first == "False this machine has no NVIDIA driver"
    assert re.match(r"merge: .*(CUDA|device)", second)
    if sys.platform == "linux":
        needed = subprocess.run(["ldd", str(built)], capture_output=True, text=True).stdout
        assert "libcud" not in needed and "torch" not in needed


@pytest.mark.parametrize(
    "library, files, message",
    [
        ({}, {}, "has no CUDA part: install nvcc 12.8 or newer"),
        (
            {},
            {"_native_cuda_missing.txt": "no nvcc\n"},
            "has no CUDA part: no nvcc; then install fastclip again",
        ),
        ({"cuda": "driver is too old"}, {}, "is built, but: driver is too old"),
        ({"cuda": ""}, {}, None),
    ],
)
def test_what_is_missing_is_reported(
    library: dict,
    files: dict[str, str],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """By the unavailable_reason, by `fastclip info`, and by whoever asks for the implementation."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = SimpleNamespace(
        usable_instructions=lambda: ["baseline"], has_bf16_product=lambda: False
    )
    if "cuda" in library:
        found.cuda = SimpleNamespace(
            driver_unavailable_reason=lambda: library["cuda"], EMULATED=False
        )
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "_load", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert (native.cuda_unavailable_reason() is None) == (message is None)
    assert main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f" cuda {native.cuda_unavailable_reason() or 'built'} operators on " in said
    gpu = torch.device("cuda")
    if message is None:
        assert backend.choose("similarity", "cuda", gpu, torch.bfloat16) == "cuda"
    else:
        with pytest.raises(ValueError, match=message):
            backend.choose("similarity", "cuda", gpu, torch.bfloat16)


def test_where_triton_cannot_run_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        cuda=SimpleNamespace(driver_unavailable_reason=lambda: "", EMULATED=False)
    )
    monkeypatch.setattr(native, "_load", lambda: library)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    for operator in ("similarity", "symmetric", "sigmoid"):
        for reason, wanted in ((None, "triton"), ("no compiler", "cuda")):
            monkeypatch.setattr(backend, "_build_reason", lambda found=reason: found)
            assert backend.choose(operator, "auto", gpu, torch.bfloat16) == wanted
        assert backend.choose(operator, "auto", gpu, torch.float64) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.choose("similarity", "auto", gpu, torch.float32) == "torch"
