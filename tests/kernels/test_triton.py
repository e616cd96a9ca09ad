"""The Triton implementation, under Triton's interpreter where there is no GPU."""

from itertools import cycle

import pytest
import torch
from torch import Tensor

from fastclip.functional import clip_loss
from fastclip.kernels.launch import INTERPRETED, count_launches
from fastclip.ops import backend, kept
from fastclip.ops.gemm import count_products
from tests.ops.cases import (
    LOSSES,
    check_error_rule,
    check_nan_shows,
    check_same_bits,
    check_ties_and_zero_rows,
    ours,
    pairwise,
    theirs,
)
from tests.ops.test_contracts import PRODUCTS, SYMMETRIC, make

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU is there: fastclip.bench.check runs the kernels on it"
)

FACTORS = {
    "name": list(LOSSES),
    "n": [1, 2, 63, 65, 127, 129],
    "width": [1, 16, 48, 77, 384, 512, 640, 1152],
    "scale": [0.1, 14.3, 100.0],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "extra": [0, 1, 40],
    "chunk": [None, 9, 33, 64],
    "autocast": [False, True],
    "per_anchor": [False, True],
}


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
    correlation: float = 0.3,
) -> None:
    case = LOSSES[name].make(n, width, scale, correlation, seed=n + width, extra=extra).cast(dtype)
    truth = theirs(name, case.double())
    eager = theirs(name, case, autocast=autocast)
    operand = torch.bfloat16 if autocast or dtype != torch.float32 else dtype
    # G is held in two or four bytes
    bytes_ = None if chunk is None else operand.itemsize * (n + extra) * chunk
    options = {"autocast": autocast, "per_anchor": per_anchor, "chunk_bytes": bytes_}
    got = ours(name, case, backend="triton", **options)
    eps = torch.finfo(operand).eps
    check_error_rule(name, got, eager, truth, case, eps, [n, width, scale, dtype, options])


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=0)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_pairwise_coverage(case: dict) -> None:
    """Every two values of different factors meet in some case."""
    check(**case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype", list(zip(LOSSES, cycle([torch.float32, torch.bfloat16]), strict=False))
)
def test_many_tiles(name: str, dtype: torch.dtype) -> None:
    """Tiles that are large, in the two dtypes in turn: small ones have both with every loss."""
    check(name, 600, 48, 14.3, dtype, extra=24, chunk=350)


@pytest.mark.slow
@pytest.mark.parametrize(
    "correlation, scale, dtype, bound",
    [
        (0.3, 14.3, torch.float32, 1e-4),
        (0.3, 100.0, torch.float32, 2e-3),
        (0.6, 100.0, torch.float32, 2e-3),
        # a gradient that is bf16 itself has its own last rounding, whatever the scale
        (0.3, 100.0, torch.bfloat16, 2.5e-3),
    ],
)
@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent", "siglip"])
def test_precision_under_autocast(
    name: str, correlation: float, scale: float, dtype: torch.dtype, bound: float
) -> None:
    """dX against float64 of the rounded features: what rounding G to bf16 leaves."""
    # the smaller the scale, the more rows it takes until rounding averages out
    rows = 1000 if scale < 100 else 500
    if name == "nt_xent" and scale == 100:
        # of two blocks
        rows //= 2
    case = LOSSES[name].make(rows, 512, scale, correlation, seed=1).cast(dtype)
    want = theirs(name, case.cast(torch.bfloat16).double())[1]
    got = ours(name, case, autocast=True, backend="triton")[1]
    error = ((got.double() - want).norm() / want.norm()).item()
    print(f"{name} {correlation} {scale} {dtype}: {error:.1e}")
    assert error <= bound


@pytest.mark.parametrize("keep_bytes", [0, None])
def test_backend_triton_launches_the_kernels(keep_bytes: int | None) -> None:
    case = make("clip", 64)
    with count_launches() as forward:
        leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
        loss = clip_loss(*leaves, backend="triton", keep_bytes=keep_bytes)
    with count_launches() as backward:
        loss.backward()
    statistics = ("lean_statistics", "totals", "flagged_statistics", "merge_flagged", "row_dot")
    assert forward == {f"{name}_kernel": 1 for name in statistics}
    gradient = {"factors": 1, "lean_gradient": 1, "flagged_gradient": 1, "finish": 2, "row_dot": 1}
    if keep_bytes is None:
        # the scale's gradient is from dX
        gradient |= {"row_dot": 2, "weigh": gradient.pop("lean_gradient")}
    assert backward == {f"{name}_kernel": count for name, count in gradient.items()}
    with count_launches() as none:
        clip_loss(*leaves, backend="torch").backward()
    assert not none


@pytest.mark.parametrize("keep_bytes", [0, 1 << 24])
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products_and_launches(
    name: str, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products as the torch implementation's, S in as many launches as there are tiles."""
    monkeypatch.setitem(kept.KEEP_BYTES, "cpu", keep_bytes)
    case = make(name, 96)
    counts = []
    for implementation in ("torch", "triton"):
        options = {"backend": implementation, "chunk_bytes": 4 * 96 * 32}
        with count_products() as count, count_launches() as launches:
            ours(name, case, **options)
        counts.append(count.flop)
    assert counts[0] == counts[1]
    # chunks of 32 rows: 3 chunks, or strips that meet every block to their right
    products_with_S = {
        "siglip": {"sigmoid_kernel": 3},
        "info_nce": {"statistics_kernel": 3, "rescale_kernel": 3},
        "info_nce_index": {"statistics_kernel": 3, "rescale_kernel": 3},
        "nt_xent": {"lean_statistics_kernel": 8, "lean_gradient_kernel": 8},
        "mp_nce": {"lean_statistics_kernel": 6, "lean_gradient_kernel": 6},
        "sup_con": {"lean_statistics_kernel": 5, "lean_gradient_kernel": 5},
    }.get(name, {"lean_statistics_kernel": 3, "lean_gradient_kernel": 3})
    if keep_bytes and "lean_gradient_kernel" in products_with_S:
        products_with_S["weigh_kernel"] = products_with_S.pop("lean_gradient_kernel")
        assert not launches["lean_gradient_kernel"]
    assert {k: launches[k] for k in products_with_S} == products_with_S
    assert name in SYMMETRIC or sum(PRODUCTS[name][:2]) in (3, 4)


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_every_time(name: str) -> None:
    case = make(name, 40, 8).cast(torch.bfloat16)
    check_same_bits(name, case, 3, backend="triton", chunk_bytes=4 * 40 * 16)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_nan_out(name: str) -> None:
    check_nan_shows(name, make(name, 9, 4), backend="triton")


@pytest.mark.parametrize("name", LOSSES)
def test_ties_zero_rows_and_one_group(name: str) -> None:
    check_ties_and_zero_rows(name, lambda: make(name, 36, 8), "triton")


def test_features_that_are_not_contiguous() -> None:
    case = make("clip", 24, 10)
    x, y, scale = case.leaves
    want = clip_loss(x, y, scale, backend="triton")
    wide = torch.cat([x, x], dim=1)[:, :10]
    for strided in (x.T.contiguous().T, wide, torch.stack([x, x], dim=1)[:, 0]):
        assert strided.stride() != x.stride()
        assert torch.equal(clip_loss(strided, y, scale, backend="triton"), want)


def test_auto_leaves_the_interpreter_alone() -> None:
    device = torch.device("cpu")
    for operator in ("similarity", "symmetric", "sigmoid"):
        assert backend.choose(operator, "auto", device, torch.float32) != "triton"
        assert backend.choose(operator, "triton", device, torch.float32) == "triton"
        with pytest.raises(ValueError, match="float64 gains nothing"):
            backend.choose(operator, "triton", device, torch.float64)


def test_compiled_with_the_kernels_inside() -> None:
    case = make("mp_nce", 36, 8)

    def loss(*leaves: Tensor) -> Tensor:
        return LOSSES["mp_nce"].run(list(leaves), case.static, backend="triton")

    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    got = torch.compile(loss, fullgraph=True)(*leaves)
    got.backward()
    want = ours("mp_nce", case, backend="triton")
    torch.testing.assert_close(got, want[0])
    torch.testing.assert_close(leaves[0].grad, want[1])
