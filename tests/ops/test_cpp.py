"""The `cpp` implementation: exactness, threads, repeats, forks, and when it is chosen."""

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastclip import native
from fastclip.functional import clip_loss
from fastclip.ops import backend
from fastclip.ops.gemm import count_products
from fastclip.ops.tiles import cpp as cpp_tiles
from fastclip.ops.tiles.base import SoftmaxStats, Tile
from tests.ops.cases import (
    LOSSES,
    Case,
    check_error_rule,
    check_lines_far_apart,
    check_nan_shows,
    check_same_bits,
    check_ties_and_zero_rows,
    ours,
    pairwise,
    theirs,
    unit,
)

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"the native library: {native.unavailable_reason()}",
)

INSTRUCTIONS = [None] if native.unavailable_reason() else native.library().usable_instructions()
FACTORS = {
    "name": list(LOSSES),
    "n": [1, 2, 17, 65, 129, 300],
    "width": [1, 16, 77, 384],
    "scale": [0.1, 14.3, 100.0, 1000.0],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "extra": [0, 1, 40],
    "chunk": [None, 9, 33],
    "autocast": [False, True],
    "keep": [0, None],
    "per_anchor": [False, True],
    # blocks of 16 columns: borders inside small tiles
    "block": [16, 256],
    "instructions": INSTRUCTIONS,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads, instructions = torch.get_num_threads(), native.library().instructions()
    torch.set_num_threads(1)
    monkeypatch.setattr(cpp_tiles, "BLOCK_ENTRIES", 1 << 12)
    yield
    torch.set_num_threads(threads)
    native.library().use_instructions(instructions)


def make(name: str, rows: int = 192, width: int = 16, scale: float = 9.0) -> Case:
    return LOSSES[name].make(rows, width, scale, 0.3, seed=1).cast(torch.float32)


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=0)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_pairwise_coverage(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two values of different factors meet in some case."""
    monkeypatch.setattr(cpp_tiles, "LEAST_COLUMNS", case["block"])
    native.library().use_instructions(case["instructions"])
    name, n, dtype, autocast = case["name"], case["n"], case["dtype"], case["autocast"]
    inputs = LOSSES[name].make(
        n, case["width"], case["scale"], 0.3, seed=n + case["width"], extra=case["extra"]
    )
    inputs = inputs.cast(dtype)
    chunk_bytes = None if case["chunk"] is None else 4 * (n + case["extra"]) * case["chunk"]
    options = {"per_anchor": case["per_anchor"], "chunk_bytes": chunk_bytes, "backend": "cpp"}
    got = ours(name, inputs, autocast=autocast, keep_bytes=case["keep"], **options)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(got[1:], inputs.leaves, strict=True))
    eager = theirs(name, inputs, autocast=autocast)
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    check_error_rule(name, got, eager, theirs(name, inputs.double()), inputs, eps, case)


@pytest.mark.parametrize("name", LOSSES)
def test_lines_far_apart_need_two_exponentials(name: str) -> None:
    check_lines_far_apart(name, "cpp")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent"])
def test_same_bits_every_time(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a number of threads; blocks are large enough to be shared."""
    torch.set_num_threads(threads)
    monkeypatch.setattr(cpp_tiles, "LEAST_COLUMNS", 400)
    repeats = 50 if threads == 1 else 10
    check_same_bits(name, make(name, 400, 8), repeats, backend="cpp")


def tile_statistics(tiles: cpp_tiles.CppTiles, tile: Tile) -> list[Tensor]:
    rows, columns = (SoftmaxStats.empty(len(t), t, torch.float32) for t in (tile.x_CD, tile.y_SD))
    tiles.statistics(tile, rows, columns)
    out_CS = tiles.gradient_buffer(len(tile.x_CD), tile.y_SD)
    weight_C = torch.ones(len(tile.x_CD))
    return [*rows, *columns, *tiles.sigmoid(tile, weight_C, out_CS), out_CS.clone()]


@pytest.mark.parametrize("own_threads", [False, True], ids=["torch's", "own"])
def test_repeats_at_any_number_of_threads(own_threads: bool) -> None:
    library = native.library()
    library.use_team(0 if own_threads else native.team())
    x, y = unit(301, 8, 1).float(), unit(1001, 8, 2).float()
    tile = Tile(x, y, torch.tensor(30.0), None, 3)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tile_statistics(cpp_tiles.CppTiles(torch.float32), tile))
            for _ in range(10):
                again = tile_statistics(cpp_tiles.CppTiles(torch.float32), tile)
                assert all(map(torch.equal, results[-1], again))
        for other in results[1:]:
            for mine, want in zip(other, results[0], strict=True):
                torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)
    finally:
        library.use_team(native.team())


def test_python_threads_side_by_side() -> None:
    case = make("clip", 400, 8)
    torch.set_num_threads(2)
    want = ours("clip", case, backend="cpp")
    found: list[list[Tensor]] = []

    def work() -> None:
        torch.set_num_threads(2)
        for _ in range(5):
            found.append(ours("clip", case, backend="cpp"))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 15
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, want, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on() -> None:
    """Neither torch's threads nor the library's are there; products are left out, they may hang."""
    cos_CS = unit(301, 8, 1).float() @ unit(1001, 8, 2).float().T
    lines = [torch.full((301,), -torch.inf), torch.zeros(301)]
    scale = torch.tensor(30.0)

    def sweep() -> bytes:
        library = native.library()
        matrix = cos_CS.data_ptr(), *cos_CS.shape, cos_CS.stride(0)
        tile = library.Tile(*matrix, scale.data_ptr(), 0, None, 0, 0, 0)
        library.statistics(tile, lines[0].data_ptr(), lines[1].data_ptr(), 0, 0, 2)
        return bytes(lines[0].untyped_storage()) + bytes(lines[1].untyped_storage())

    start = [line.clone() for line in lines]
    torch.set_num_threads(2)
    want = sweep()
    for line, first in zip(lines, start, strict=True):
        line.copy_(first)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if sweep() == want else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_nan_ties_zero_rows(name: str) -> None:
    check_nan_shows(name, make(name, 9, 4), backend="cpp")
    check_ties_and_zero_rows(name, lambda: make(name, 36, 8), "cpp")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_group_has_no_negatives_and_no_gradient(dtype: torch.dtype) -> None:
    x, y = (unit(37, 8, seed).float().requires_grad_() for seed in (1, 2))
    group = torch.zeros(37, dtype=dtype)
    loss = clip_loss(x, y, 10.0, row_group=group, column_group=group, backend="cpp")
    assert loss.item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss, (x, y)))


def test_features_that_are_not_contiguous() -> None:
    x, y, scale = make("clip", 24, 10).leaves
    want = clip_loss(x, y, scale, backend="cpp")
    wide = torch.cat([x, x], dim=1)[:, :10]
    for strided in (x.T.contiguous().T, wide, torch.stack([x, x], dim=1)[:, 0]):
        assert strided.stride() != x.stride()
        assert torch.equal(clip_loss(strided, y, scale, backend="cpp"), want)


@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_torch(name: str) -> None:
    case = make(name)
    counts = []
    for implementation in ("torch", "cpp"):
        with count_products() as count:
            ours(name, case, backend=implementation, chunk_bytes=4 * 192 * 33)
        counts.append(count.flop)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("threads", [1, 3])
def test_bf16_features_are_multiplied_as_they_are(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wide copy of them; and still no rounding but float32's and the features' own."""
    if not native.has_bf16_product():
        pytest.skip("this processor has no bf16 products")
    torch.set_num_threads(threads)
    seen: list[bool] = []
    library = native.library()

    def noted(a: int, row: int, column: int, wide: bool, *rest: int) -> None:
        seen.append(wide)
        library.bf16_product(a, row, column, wide, *rest)

    spy = SimpleNamespace(
        **{n: getattr(library, n) for n in dir(library)} | {"bf16_product": noted}
    )
    monkeypatch.setattr(native, "library", lambda: spy)
    for name, with_S, with_G in (("clip", 1, 2), ("siglip", 1, 2), ("info_nce", 1, 2)):
        seen.clear()
        case = LOSSES[name].make(250, 64, 14.3, 0.3, seed=2).cast(torch.float32)
        with count_products() as count:
            got = ours(name, case, autocast=True, backend="cpp")[1]
        assert count.products_of(250, 250, 64) == with_S + with_G
        # S from bf16 features, then G, which is float32
        assert set(seen) == {False, True}
        want = theirs(name, case.cast(torch.bfloat16).double())[1]
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_memory_is_a_chunk_and_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the walk's own: G of one chunk, and cosines of one block where G is not formed."""
    made: list[cpp_tiles.CppTiles] = []
    original = cpp_tiles.CppTiles.__init__

    def noted(self: cpp_tiles.CppTiles, dtype: torch.dtype) -> None:
        original(self, dtype)
        made.append(self)

    monkeypatch.setattr(cpp_tiles.CppTiles, "__init__", noted)
    for name in ("clip", "siglip", "info_nce"):
        made.clear()
        ours(name, make(name, 700), backend="cpp", chunk_bytes=4 * 700 * 50)
        sizes = {n: b.numel() for tiles in made for n, b in tiles._pool.items()}
        assert sizes.get("S", 0) <= 50 * cpp_tiles.LEAST_COLUMNS
        assert sizes["G"] == 50 * 700
        assert set(sizes) <= {"S", "G"}


def test_compiled_with_the_library_inside() -> None:
    case = make("mp_nce", 36, 8)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]

    def loss(*leaves: Tensor) -> Tensor:
        return LOSSES["mp_nce"].run(list(leaves), case.static, backend="cpp")

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    got.backward()
    want = ours("mp_nce", case, backend="cpp")
    torch.testing.assert_close(got, want[0])
    torch.testing.assert_close(leaves[0].grad, want[1])


def test_when_it_is_chosen() -> None:
    for operator in ("similarity", "symmetric", "sigmoid"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backend.choose(operator, "auto", torch.device("cpu"), dtype) == "cpp"
        assert backend.choose(operator, "auto", torch.device("cpu"), torch.float64) == "torch"
        with pytest.raises(ValueError, match="no kernels for torch"):
            backend.choose(operator, "cpp", torch.device("cpu"), torch.float64)
        with pytest.raises(ValueError, match="the features are on meta"):
            backend.choose(operator, "cpp", torch.device("meta"), torch.float32)
    assert backend.choose("distillation", "auto", torch.device("cpu"), torch.float32) == "torch"
