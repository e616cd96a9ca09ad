"""The `cuda` implementation whole, its kernels run on the CPU by the emulation of csrc/tests."""

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip import native
from fastclip.functional import clip_loss
from fastclip.ops import backend, kept
from fastclip.ops.gemm import count_products
from fastclip.ops.tiles.base import SoftmaxStats, Tile
from fastclip.ops.tiles.cuda import CudaTiles
from fastclip.ops.tiles.torch import TorchTiles
from tests.losses.test_groups import CASES as GROUPS
from tests.losses.test_groups import check_positives_of_a_tile
from tests.losses.test_groups import test_every_implementation_has_them as check_groups
from tests.ops import test_biases, test_kept
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
    "keep": [None, 0],
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
    keep: int | None = None,
) -> None:
    case = LOSSES[name].make(n, width, scale, 0.3, seed=n + width, extra=extra).cast(dtype)
    eager = theirs(name, case, autocast=autocast)
    bytes_ = None if chunk is None else 6 * (n + extra) * chunk
    options = {"autocast": autocast, "per_anchor": per_anchor, "chunk_bytes": bytes_}
    options["keep_bytes"] = keep
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, role", GROUPS)
def test_groups_and_weights(name: str, role: str, dtype: torch.dtype) -> None:
    """Against the definitions, as the other implementations."""
    check_groups(name, role, "cuda", dtype)


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("kind", test_biases.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_are_the_definitions(dtype: torch.dtype, kind: str, keep_bytes: int | None) -> None:
    with pytest.MonkeyPatch.context() as patched:
        # a sweep that is left to torch's fails
        patched.setattr(TorchTiles, "_logits", None)
        test_biases.test_every_implementation_has_them("cuda", dtype, kind, keep_bytes)


@pytest.mark.parametrize(
    "test",
    [
        test_biases.test_maxima_have_them,
        test_biases.test_a_bias_far_below_does_not_vanish,
        test_biases.test_only_columns_have_biases_or_only_rows,
    ],
)
def test_biases_as_elsewhere(test: Callable[[str], None]) -> None:
    test("cuda")


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positives_of_a_tile(dtype: torch.dtype, ids: torch.dtype) -> None:
    check_positives_of_a_tile("cuda", dtype, ids)


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


@pytest.mark.parametrize("scale", [1e-4, 14.3, -20.0, 1e3, 1e4])
def test_kept_products_serve_any_scale(scale: float) -> None:
    test_kept.check_clip(*test_kept.PAIRS, scale, "cuda", 3)


@pytest.mark.parametrize("length", [1e-3, 2.0, 1e3])
def test_kept_products_serve_features_of_any_length(length: float) -> None:
    images, texts = test_kept.PAIRS
    test_kept.check_clip(images * length, texts, 14.3, "cuda", 3)


@pytest.mark.parametrize(
    "test",
    [
        test_kept.test_an_outlier,
        test_kept.test_a_row_whose_exponentials_vanish,
        test_kept.test_a_batch_of_one_has_no_negatives,
        test_kept.test_a_row_left_out_whole,
        test_kept.test_a_loss_scale,
        test_kept.test_metrics_have_their_maxima,
    ],
)
def test_kept_products_as_exponentials_are_tested(test: Callable[[str], None]) -> None:
    test("cuda")


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_kept_products_with_offsets(offset: float) -> None:
    test_kept.test_offsets(offset, "cuda")


@pytest.mark.parametrize("name", test_kept.KEEPS)
def test_a_second_backward_finds_the_products_unaltered(name: str) -> None:
    test_kept.test_a_second_backward_reads_them_unaltered(name, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", test_kept.KEEPS)
def test_what_is_kept_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """It is S that is kept: only a product goes."""
    case = LOSSES[name].make(150, 24, 14.3, 0.3, seed=2).cast(dtype)
    found, flops = [], []
    for keep in (None, 0):
        with count_products() as count:
            found.append(
                ours(name, case, backend="cuda", keep_bytes=keep, chunk_bytes=6 * 150 * 80)
            )
        flops.append(count.flop)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert flops[0] < flops[1]


@pytest.mark.parametrize("name", test_kept.KEEPS)
@pytest.mark.parametrize("n", [128, 130])
def test_products_are_kept_in_aligned_rows_within_the_budget(
    name: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LOSSES[name].make(n, 8, 9.0, 0.3, seed=1).cast(torch.bfloat16)
    found: list[Tensor] = []
    original = kept.Rooms.next

    def room(self: kept.Rooms, chunk: Any, columns: int) -> Tensor:
        got = original(self, chunk, columns)
        assert got.dtype == torch.float32 and got.storage_offset() % 16 == got.stride(0) % 16 == 0
        assert got.storage_offset() + len(got) * got.stride(0) <= len(self._entries)
        found.append(self._entries)
        return got

    monkeypatch.setattr(kept.Rooms, "next", room)
    ours(name, case, backend="cuda", chunk_bytes=6 * n * 40)
    needed = found[-1].nbytes
    if name.startswith("clip"):
        assert needed == 4 * n * -(-n // 16) * 16
    flops = []
    for keep in (needed, needed - 1):
        with count_products() as count:
            ours(name, case, backend="cuda", keep_bytes=keep)
        flops.append(count.flop)
    assert flops[0] < flops[1]


def test_metrics_alone_take_maxima() -> None:
    """A maximum that nobody asked for is an anchor."""
    x = unit(64, 8, 1).float()
    tile = Tile(x, x, torch.tensor(100.0), torch.tensor(-7.0), 0)
    for maxima in (False, True):
        rows, columns = (SoftmaxStats.empty(64, x, torch.float32) for _ in range(2))
        CudaTiles(torch.float32, maxima).statistics(tile, rows, columns)
        logits = (100 * x @ x.T).fill_diagonal_(-torch.inf)
        largest = logits.amax(dim=1) - 7
        assert torch.allclose(rows.lse(), logits.logsumexp(dim=1) - 7, rtol=1e-5)
        for found in (rows.max, columns.max):
            if maxima:
                assert torch.allclose(found, largest, rtol=1e-5)
            else:
                assert (found == 100 - 69 - 7).any()


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
