"""Fixtures shared by all tests."""

import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

# a cache of compiled graphs from before a change would run what is no longer there
_COMPILED = tempfile.mkdtemp(prefix="fastclip-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED

if not torch.cuda.is_available():
    # read when Triton is first imported: kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="no slow tests, none over processes, the first and the last case of each other",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: run side by side, one that comes last runs alone."""
    if "fuzz" not in config.option.markexpr:
        _leave_out(config, items, lambda item: item.get_closest_marker("fuzz") is not None)
    if config.option.fast:
        long = ("slow", "dist")
        _leave_out(config, items, lambda item: any(map(item.get_closest_marker, long)))
        cases: dict[tuple[Path, str], list[pytest.Item]] = {}
        for item in items:
            cases.setdefault((item.path, item.name.partition("[")[0]), []).append(item)
        ends = {id(case) for found in cases.values() for case in (found[0], found[-1])}
        _leave_out(config, items, lambda item: id(item) not in ends)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _leave_out(
    config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[item for item in items if unwanted(item)])
    items[:] = [item for item in items if not unwanted(item)]


def pytest_unconfigure() -> None:
    shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True)
def poisoned_empty_memory() -> Iterator[None]:
    """Uninitialized memory is NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The package's messages since the last call, a line each."""
    caplog.set_level(logging.INFO, "fastclip")

    def read() -> str:
        lines = [record.message for record in caplog.records if record.name == "fastclip"]
        caplog.clear()
        return "".join(f"{line}\n" for line in lines)

    return read


@pytest.fixture
def real_data() -> Path:
    """The folder of real data, where the environment names one."""
    folder = os.environ.get("FASTCLIP_REAL_DATA")
    if not folder:
        pytest.skip("FASTCLIP_REAL_DATA is not set: no real data on this machine")
    return Path(folder)


def jpeg(color: tuple[int, int, int] = (200, 30, 30), size: int = 32) -> bytes:
    """A small JPEG of one color."""
    buffer = BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (member name, bytes) pairs."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar of (member name, bytes) pairs; by default of `samples` good samples."""

    def make(
        name: str = "shard-00000.tar",
        members: list[tuple[str, bytes]] | None = None,
        samples: int = 8,
        first: int = 0,
    ) -> Path:
        if members is None:
            members = []
            for i in range(first, first + samples):
                color = (i * 37 % 256, i * 91 % 256, i * 13 % 256)
                members.append((f"{i:05d}.jpg", jpeg(color)))
                members.append((f"{i:05d}.txt", f"caption number {i}".encode()))
                members.append((f"{i:05d}.cls", str(i % 3).encode()))
        return write_tar(tmp_path / name, members)

    return make
