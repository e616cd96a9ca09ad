"""S of small batches, whole, without the native library: Triton's kernels, and torch's operations.

The kernels run under Triton's interpreter, so they are given few rows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip import functional
from fastclip.ops import dense, dense_sweeps
from fastclip.ops.backend import unavailable_reason
from fastclip.ops.gemm import count_products
from tests.ops.cases import (
    LOSSES,
    Case,
    check_each_input_alone,
    check_error_rule,
    check_kept_graph,
    check_lines_far_apart,
    check_metrics,
    check_nan_shows,
    check_same_bits,
    check_ties_and_zero_rows,
    ours,
    pairwise,
    theirs,
)

CPU = torch.device("cpu")
_REASON = unavailable_reason("similarity", "triton", CPU, torch.float32)
IMPLEMENTATIONS = ["torch", "triton"] if _REASON is None else ["torch"]
# the interpreter takes a third of a second for a step: one loss for each way through the kernels
DIFFERENT = ("clip_smoothed_grouped", "siglip", "info_nce_index", "mp_nce", "sup_con")
EVERY = [("torch", name) for name in LOSSES]
EVERY += [(IMPLEMENTATIONS[-1], name) for name in DIFFERENT if _REASON is None]
FACTORS: dict[str, list[Any]] = {
    "name": list(LOSSES),
    "implementation": IMPLEMENTATIONS,
    "n": [1, 2, 17, 70],
    "width": [1, 16, 77],
    "scale": [0.1, 14.3, 100.0, 1e4],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "extra": [0, 1, 40],
    "autocast": [False, True],
    "per_anchor": [False, True],
}
SYMMETRIC = ("nt_xent", "mp_nce", "sup_con")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every loss by way of a whole S."""
    made: list[Any] = []
    original = dense_sweeps.Sweeps.forward

    def forward(ctx: Any, call: Any, *inputs: Any) -> Tensor:
        made.append(call)
        return original(ctx, call, *inputs)

    monkeypatch.setattr(dense_sweeps.Sweeps, "forward", staticmethod(forward))
    return made


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    use(name, monkeypatch)
    return name


def use(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "implementation", lambda device, dtype: implementation)


def make(name: str, rows: int = 30, width: int = 8, scale: float = 9.0, extra: int = 0) -> Case:
    return LOSSES[name].make(rows, width, scale, 0.3, seed=1, extra=extra).cast(torch.float32)


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=0)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_pairwise_coverage(
    case: dict[str, Any], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every two values of different factors meet in some case."""
    use(case["implementation"], monkeypatch)
    name, n, dtype, autocast = case["name"], case["n"], case["dtype"], case["autocast"]
    inputs = LOSSES[name].make(
        n, case["width"], case["scale"], 0.3, seed=n + case["width"], extra=case["extra"]
    )
    inputs = inputs.cast(dtype)
    got = ours(name, inputs, autocast=autocast, per_anchor=case["per_anchor"])
    assert [call.implementation for call in calls] == [case["implementation"]]
    assert all(g.dtype == leaf.dtype for g, leaf in zip(got[1:], inputs.leaves, strict=True))
    eager = theirs(name, inputs, autocast=autocast)
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    check_error_rule(name, got, eager, theirs(name, inputs.double()), inputs, eps, case)


@pytest.mark.parametrize("per_anchor", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_float64_has_its_precision(name: str, per_anchor: bool, calls: list[Any]) -> None:
    """Of its own accord: no library and no kernel has it."""
    case = LOSSES[name].make(33, 6, 14.3, 0.3, seed=1, extra=3)
    for got, want in zip(ours(name, case, per_anchor=per_anchor), theirs(name, case), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert [call.implementation for call in calls] == ["torch"]


@pytest.mark.parametrize("implementation, name", EVERY, indirect=["implementation"])
def test_hard_inputs(name: str, implementation: str) -> None:
    check_lines_far_apart(name, "auto")
    check_nan_shows(name, make(name, 12))
    check_ties_and_zero_rows(name, lambda: make(name, 12), "auto")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("scale", [0.0, -7.0, 1e-4])
@pytest.mark.parametrize("name", ["clip_smoothed_grouped", "siglip", "mp_nce"])
def test_scales_at_the_ends_of_their_range(name: str, scale: float, implementation: str) -> None:
    case = LOSSES[name].make(20, 6, 1.0, 0.3, seed=5)
    case.leaves[case.features] *= scale
    case = case.cast(torch.float32)
    for got, want in zip(ours(name, case), theirs(name, case.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation, name", EVERY, indirect=["implementation"])
def test_same_bits_every_time(name: str, implementation: str) -> None:
    check_same_bits(name, make(name, 40), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation, name", EVERY, indirect=["implementation"])
def test_a_kept_graph_gives_the_same_gradients_again(
    name: str, dtype: torch.dtype, implementation: str
) -> None:
    check_kept_graph(name, make(name).cast(dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "implementation, name",
    [*EVERY[: len(LOSSES)], (IMPLEMENTATIONS[-1], "clip_smoothed_grouped")],
    indirect=["implementation"],
)
def test_each_input_alone_has_its_gradient(name: str, reduction: str, implementation: str) -> None:
    assert check_each_input_alone(name, reduction) > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("name", ["clip", "clip_grouped", "info_nce_index", "nt_xent", "mp_nce"])
def test_metrics_are_the_operators(name: str, implementation: str) -> None:
    check_metrics(name)


@pytest.mark.parametrize("implementation, name", EVERY, indirect=["implementation"])
def test_products_are_counted(name: str, implementation: str) -> None:
    case = make(name)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    rows = sum(map(len, leaves[: case.features])) if name in SYMMETRIC else 30
    columns = 2 * 30 + 3 if name == "info_nce_bank" else rows
    with count_products() as count:
        loss = LOSSES[name].run(leaves, case.static)
    assert count.products_of(rows, columns, 8) == 1
    with count_products() as count:
        loss.backward()
    # a bank's columns have no gradient
    columns_share = 30 / columns if name == "info_nce_bank" else 1
    assert count.products_of(rows, columns, 8) == 1 + (name not in SYMMETRIC) * columns_share


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
def test_numbers_and_tensors_of_any_dtype(implementation: str) -> None:
    """A scale as a number, as a tensor of one element, in 16 bits or 64; its gradient in kind."""
    x, y = make("clip").leaves[:2]
    want = functional.clip_loss(x, y, 9.0, backend="reference")
    scale = torch.tensor(9.0, requires_grad=True)
    (of_scale,) = torch.autograd.grad(functional.clip_loss(x, y, scale, backend="reference"), scale)
    torch.testing.assert_close(functional.clip_loss(x, y, 9), want)
    for given in (scale, scale[None], scale.bfloat16(), scale.double()):
        leaf = given.detach().requires_grad_()
        loss = functional.clip_loss(x, y, leaf)
        loss.backward()
        torch.testing.assert_close(loss, want)
        assert leaf.grad is not None and leaf.grad.shape == given.shape
        tolerance = 1e-2 if given.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            leaf.grad.float().view(()), of_scale, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
def test_features_that_are_not_contiguous(implementation: str) -> None:
    x, y, scale = make("clip").leaves
    want = functional.clip_loss(x, y, scale)
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    for strided in (x.T.contiguous().T, wide, torch.stack([x, x], dim=1)[:, 0]):
        assert strided.stride() != x.stride()
        assert torch.equal(functional.clip_loss(strided, y, scale), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
def test_domains_and_lists_of_weights(implementation: str) -> None:
    """Sixteen domains are the most; a table may have some that no block is of."""
    blocks = [x.float() for x in LOSSES["mp_nce"].make(12, 8, 9.0, 0.3, seed=2).leaves[:3]]
    domains, count = [15, 2, 7], 16
    scale = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) * 5
    weight = [[float(p + q) for q in range(count)] for p in range(count)]
    leaf = scale.clone().requires_grad_()
    twin = scale.clone().requires_grad_()
    got = functional.mp_nce_loss(blocks, domains, leaf, 0.5, pair_weight=weight)
    want = functional.mp_nce_loss(
        blocks, domains, twin, 0.5, pair_weight=weight, backend="reference"
    )
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent", "siglip"])
def test_positives_stay_out_of_what_is_rounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dX under autocast against float64 of the rounded features: a fifth of eager code's error."""
    use("triton", monkeypatch)
    case = LOSSES[name].make(150, 64, 14.3, 0.3, seed=1).cast(torch.float32)
    want = theirs(name, case.cast(torch.bfloat16).double())[1]
    mine, eager = (f(name, case, autocast=True)[1].double() for f in (ours, theirs))
    error, least = ((found - want).norm() / want.norm() for found in (mine, eager))
    print(f"{name}: {error:.1e}, eager {least:.1e}")
    assert error <= least / 5
