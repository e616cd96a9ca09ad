"""The `cuda` implementation whole, its kernels run on the CPU by the emulation of csrc/tests."""

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastclip import native
from fastclip.functional import clip_loss
from fastclip.ops import backend, kept
from fastclip.ops.gemm import count_products
from fastclip.ops.tiles.base import SoftmaxStats, Tile
from fastclip.ops.tiles.cuda import CudaTiles
from tests.ops.cases import (
    LOSSES,
    check_error_rule,
    check_lines_far_apart,
    check_nan_shows,
    check_same_bits,
    ours,
    pairwise,
    theirs,
    unit,
)
from tests.ops.test_contracts import PRODUCTS, make
from tests.test_repo_shape import ROOT

pytestmark = pytest.mark.slow

FACTORS = {
    "name": list(LOSSES),
    "n": [1, 2, 63, 65, 127, 129],
    "width": [1, 16, 77],
    "scale": [0.1, 14.3, 100.0],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "extra": [0, 1, 40],
    "chunk": [None, 9, 33],
    "autocast": [False, True],
    "per_anchor": [False, True],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The native library with the emulated part, beside the installed one."""
    if sys.platform != "linux":
        pytest.skip("the emulation's fibers are glibc's")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) or not shutil.which("cmake"):
        pytest.skip("no C++ compiler or no CMake is installed")
    folder = tmp_path_factory.mktemp("emulated")
    options = ["-DFASTCLIP_CUDA=EMULATED", "-DFASTCLIP_MODULE=ON", "-DFASTCLIP_TESTS=OFF"]
    options += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (path,) = Path(folder).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def emulated(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_load", lambda: library)
    yield


def check(
    name: str,
    n: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
    extra: int = 0,
    chunk: int | None = None,
    autocast: bool = False,
    per_anchor: bool = False,
) -> None:
    case = LOSSES[name].make(n, width, scale, 0.3, seed=n + width, extra=extra).cast(dtype)
    eager = theirs(name, case, autocast=autocast)
    bytes_ = None if chunk is None else 6 * (n + extra) * chunk
    options = {"autocast": autocast, "per_anchor": per_anchor, "chunk_bytes": bytes_}
    got = ours(name, case, backend="cuda", **options)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(got[1:], case.leaves, strict=True))
    # G is bf16 for all but float32
    operand = torch.bfloat16 if autocast or dtype != torch.float32 else dtype
    eps = torch.finfo(operand).eps
    context = [n, width, scale, dtype, options]
    check_error_rule(name, got, eager, theirs(name, case.double()), case, eps, context)


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=0)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_pairwise_coverage(case: dict) -> None:
    """Every two values of different factors meet in some case."""
    check(**case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_several_pieces_a_tile(name: str, dtype: torch.dtype) -> None:
    check(name, 300, 24, 14.3, dtype, extra=24, chunk=200)


@pytest.mark.parametrize("name", LOSSES)
def test_lines_far_apart_need_two_exponentials(name: str) -> None:
    check_lines_far_apart(name, "cuda")


@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent", "siglip"])
def test_precision_under_autocast(name: str) -> None:
    """dX against float64 of the rounded features: what rounding G to bf16 leaves, S unrounded."""
    case = LOSSES[name].make(200, 64, 14.3, 0.3, seed=1).cast(torch.float32)
    want = theirs(name, case.cast(torch.bfloat16).double())[1]
    got = ours(name, case, autocast=True, backend="cuda")[1]
    assert (got.double() - want).norm() <= 5e-4 * want.norm()


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_torch(name: str) -> None:
    case = make(name, 192)
    counts = []
    for implementation in ("torch", "cuda"):
        with count_products() as count, kept.switched_off():
            ours(name, case, backend=implementation, chunk_bytes=4 * 192 * 32)
        counts.append(count.flop)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_every_time(name: str) -> None:
    case = make(name, 150, 8).cast(torch.bfloat16)
    check_same_bits(name, case, 2, backend="cuda", chunk_bytes=6 * 150 * 80)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_nan_out(name: str) -> None:
    check_nan_shows(name, make(name, 9, 4), backend="cuda")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_group_has_no_negatives_and_no_gradient(dtype: torch.dtype) -> None:
    x, y = (unit(37, 8, seed).float().requires_grad_() for seed in (1, 2))
    group = torch.zeros(37, dtype=dtype)
    loss = clip_loss(x, y, 10.0, row_group=group, column_group=group, backend="cuda")
    assert loss.item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss, (x, y)))


def test_features_that_are_not_contiguous() -> None:
    x, y, scale = make("clip", 24, 10).leaves
    want = clip_loss(x, y, scale, backend="cuda")
    for strided in (x.T.contiguous().T, torch.stack([x, x], dim=1)[:, 0]):
        assert strided.stride() != x.stride()
        assert torch.equal(clip_loss(strided, y, scale, backend="cuda"), want)


@pytest.mark.parametrize("dtype, entry_bytes", [(torch.float32, 4), (torch.bfloat16, 6)])
def test_memory_is_a_tile(dtype: torch.dtype, entry_bytes: int) -> None:
    """S in float32, and G in its place or beside it in bf16: `itemsize` bytes an entry."""
    tiles = CudaTiles(dtype)
    assert tiles.itemsize == entry_bytes
    x = unit(64, 8, 1).to(dtype)
    tile = Tile(x, x, torch.tensor(9.0), None, 0)
    tiles.statistics(tile, SoftmaxStats.empty(64, x, torch.float32), None)
    if dtype == torch.float32:
        tiles._pool.clear()  # forward and backward have tiles of their own
    rows, _ = tiles.begin_rows(tile)
    tiles.end_rows(rows.sum, tiles.gradient_buffer(64, x))
    assert sum(buffer.nbytes for buffer in tiles._pool.values()) == 64 * 64 * entry_bytes


def test_launches(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep a tile, and a merge for rows and columns; a row of positives once each way."""
    seen: Counter[str] = Counter()

    def spied(name: str) -> Any:
        original = getattr(library.cuda, name)

        def call(*arguments: Any) -> Any:
            seen[name] += 1
            return original(*arguments)

        return call

    kernels = (
        "statistics",
        "begin_rows",
        "merge",
        "gradient",
        "end_rows",
        "sigmoid",
        "finish",
        "row_dot",
    )
    others = {"Tile": library.cuda.Tile, "WARPS": library.cuda.WARPS, "EMULATED": True}
    others["driver_unavailable_reason"] = library.cuda.driver_unavailable_reason
    spy = SimpleNamespace(cuda=SimpleNamespace(**{k: spied(k) for k in kernels}, **others))
    spy.bf16_product = getattr(library, "bf16_product", None)
    monkeypatch.setattr(native, "_load", lambda: spy)
    ours("clip", make("clip", 64), backend="cuda")
    assert seen == {"statistics": 1, "merge": 1, "gradient": 1, "finish": 2, "row_dot": 2}
    seen.clear()
    ours("siglip", make("siglip", 64), backend="cuda")
    assert seen == {"sigmoid": 1, "finish": 2, "row_dot": 1}
    seen.clear()
    ours("info_nce", make("info_nce", 64), backend="cuda")
    assert seen == {"begin_rows": 1, "merge": 1, "end_rows": 1, "finish": 2, "row_dot": 1}


def test_a_failed_launch_is_an_error(library: ModuleType) -> None:
    with pytest.raises(
        RuntimeError, match=r"row_dot: \d+ thread blocks, CUDA's limit is 2147483647"
    ):
        library.cuda.row_dot(1 << 40, 1, (0, 1, 0), (0, 1, 0), 0, 0)


def test_when_it_is_chosen() -> None:
    """Never by itself on a CPU, where it is the emulation; what it cannot do it says."""
    cpu = torch.device("cpu")
    for operator in ("similarity", "symmetric", "sigmoid"):
        assert backend.choose(operator, "auto", cpu, torch.float32) != "cuda"
        assert backend.choose(operator, "cuda", cpu, torch.bfloat16) == "cuda"
        with pytest.raises(ValueError, match="float64 gains nothing"):
            backend.choose(operator, "cuda", cpu, torch.float64)
