"""The similarity operator through `clip_loss`: exactness, memory, counts, contracts."""

import math
import random
from collections.abc import Callable
from functools import reduce

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.functional import clip_loss
from fastclip.ops.chunks import chunk_rows
from fastclip.ops.gemm import count_products
from fastclip.ops.similarity import similarity_statistics

BACKENDS = ("torch", "reference")


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(
        torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1
    ).to(dtype)


def correlated(rows: int, width: int, correlation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors whose pairs have about the given cosine."""
    x, noise = features(rows, width, seed), features(rows, width, seed + 1)
    return x, F.normalize(correlation * x + (1 - correlation**2) ** 0.5 * noise, dim=-1)


def oracle(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    smoothing: float = 0.0,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
) -> Tensor:
    """CLIP's loss per pair, one logaddexp at a time, from the definition of cross-entropy."""
    n, m = len(x), len(y)
    losses = []
    for i in range(n):

        def masked(row: int, column: int) -> bool:
            if row_group is None or column_group is None:
                return False
            return row != column and bool(row_group[row] == column_group[column])

        row = [scale * (x[i] @ y[j]) for j in range(m) if not masked(i, j)]
        column = [scale * (x[j] @ y[i]) for j in range(n) if not masked(j, i)]
        positive = scale * (x[i] @ y[i])
        total = x.new_zeros(())
        for logits in (row, column):
            everything = reduce(torch.logaddexp, logits)
            one_hot = everything - positive
            uniform = everything - sum(logits) / len(logits)
            total = total + (1 - smoothing) * one_hot + smoothing * uniform
        losses.append(total / 2)
    return torch.stack(losses)


def random_case(seed: int) -> dict:
    rng = random.Random(seed)
    n = rng.choice([1, 2, 3, 7, 16, 33])
    return {
        "n": n,
        "m": n + rng.choice([0, 0, 1, 5]),
        "width": rng.choice([1, 4, 16, 31]),
        "scale": rng.choice([0.1, 1.0, 1 / 0.07, 100.0]),
        "smoothing": rng.choice([0.0, 0.0, 0.1]),
        # 8 bytes a logit: from one row a chunk to all in one
        "chunk_bytes": rng.choice([1, 8 * 3 * n, 8 * 7 * n, None]),
        "needs": rng.choice([(1, 1, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]),
        "reduction": rng.choice(["mean", "mean", "sum", "none"]),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(40))
def test_float64_equals_the_oracle(seed: int, backend: str) -> None:
    case = random_case(seed)
    n = case["n"]
    inputs = (
        features(n, case["width"], 100 + seed),
        features(case["m"], case["width"], 200 + seed),
        torch.tensor(case["scale"], dtype=torch.float64),
    )
    upstream = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def run(function):
        leaves = [
            t.clone().requires_grad_(bool(need))
            for t, need in zip(inputs, case["needs"], strict=True)
        ]
        loss = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad((loss * upstream).sum() if loss.ndim else loss, wanted)
        return [loss.detach(), *grads]

    def expected(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        per_pair = oracle(x, y, scale, case["smoothing"])
        return {"mean": per_pair.mean(), "sum": per_pair.sum(), "none": per_pair}[case["reduction"]]

    def actual(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        options = {"label_smoothing": case["smoothing"], "reduction": case["reduction"]}
        options |= {"backend": backend, "chunk_bytes": case["chunk_bytes"]}
        return clip_loss(x, y, scale, **options)

    divisor = n if case["reduction"] == "mean" else 1
    for got, want in zip(run(actual), run(expected), strict=True):
        assert got.shape == want.shape
        bound = 1e-12 * max(want.norm().item(), case["scale"] / divisor)
        assert (got - want).norm().item() <= bound


@pytest.mark.parametrize("correlation, scale", [(0.0, 14.3), (0.3, 14.3), (0.3, 100.0), (0.0, 0.1)])
@pytest.mark.parametrize("n", [2, 65, 129])
def test_float64_equals_open_clip(n: int, correlation: float, scale: float) -> None:
    x, y = correlated(n, 32, correlation, seed=n)
    s = torch.tensor(scale, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, y, s)]
    others = [t.clone().requires_grad_() for t in (x, y, s)]
    loss = clip_loss(*leaves, chunk_bytes=8 * n * 10)
    want = open_clip.ClipLoss()(*others)
    if want.item() <= 1e-2:
        pytest.fail("the case is saturated: open_clip itself is inexact there")
    loss.backward()
    want.backward()
    assert abs(loss - want).item() <= 1e-12 * max(want.item(), scale / n)
    for ours, theirs in zip(leaves, others, strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-12 * max(theirs.grad.norm(), scale / n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_left_out(backend: str) -> None:
    x, y = features(9, 6, 1), features(12, 6, 2)
    row_group = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5])
    column_group = torch.cat([row_group, torch.tensor([0, 7, 3])])
    scale = torch.tensor(9.0, dtype=torch.float64)
    groups = {"row_group": row_group, "column_group": column_group}
    got = clip_loss(x, y, scale, reduction="none", backend=backend, chunk_bytes=400, **groups)
    torch.testing.assert_close(
        got, oracle(x, y, scale, 0.0, row_group, column_group), rtol=1e-13, atol=1e-13
    )


def test_one_group_has_no_negatives_and_no_gradient() -> None:
    x, y = features(5, 4, 1).requires_grad_(), features(5, 4, 2).requires_grad_()
    group = torch.zeros(5, dtype=torch.int64)
    for backend in BACKENDS:
        loss = clip_loss(x, y, 10.0, row_group=group, column_group=group, backend=backend)
        gradients = torch.autograd.grad(loss, (x, y))
        assert loss.item() == 0
        assert all(torch.count_nonzero(g) == 0 for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    scale = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    for n, m, smoothing in ((1, 1, 0.0), (4, 4, 0.1), (3, 5, 0.1), (2, 2, 0.0)):
        x, y = features(n, 3, n).requires_grad_(), features(m, 3, m + 9).requires_grad_()
        options = {"label_smoothing": smoothing, "backend": backend, "chunk_bytes": 64}
        assert torch.autograd.gradcheck(
            lambda x, y, s, o=options: clip_loss(x, y, s, reduction="none", **o), (x, y, scale)
        )


def test_reference_is_differentiable_twice_and_fused_says_so() -> None:
    x, y = features(3, 2, 1).requires_grad_(), features(3, 2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, y: clip_loss(x, y, 3.0, backend="reference"), (x, y)
    )
    (dx,) = torch.autograd.grad(clip_loss(x, y, 3.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: clip_loss(x, y.detach(), 3.0), (x.detach(),), (x.detach(),))


CASES = [(0.0, 1 / 0.07), (0.3, 1 / 0.07), (0.3, 100.0), (0.6, 100.0), (0.0, 0.1)]


def run_with_gradients(
    loss_function: Callable[..., Tensor], x: Tensor, y: Tensor, scale: float, autocast: bool
) -> list[Tensor]:
    """Loss and the gradients of both features and the scale."""
    scale_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [x, y, torch.tensor(scale, dtype=scale_dtype)]
    leaves = [t.clone().requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_function(*leaves)
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 65, 500])
@pytest.mark.parametrize("correlation, scale", CASES)
def test_low_precision_error_rule(
    correlation: float, scale: float, n: int, dtype: torch.dtype, autocast: bool
) -> None:
    """Error at most twice that of open_clip in the same precision, plus eight roundings.

    The second part, in units of the dtype that the products' operands have, is what keeps an
    exact zero of the other side, or a lucky cancellation in its mean, from failing us.
    """
    x, y = (t.to(dtype) for t in correlated(n, 64, correlation, seed=n))
    truth = run_with_gradients(oracle_dense, x.double(), y.double(), scale, False)
    ours = run_with_gradients(clip_loss, x, y, scale, autocast)
    theirs = run_with_gradients(open_clip.ClipLoss(), x, y, scale, autocast)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == dtype
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    # the scalar gradient is a mean of N terms q * cos
    sizes = [t.abs().max().item() for t in truth[:3]] + [(x.double() @ y.double().T).abs().mean()]
    for got, other, want, size in zip(ours, theirs, truth, sizes, strict=True):
        error = (got.double() - want).abs().max()
        assert error <= 2 * (other.double() - want).abs().max() + 8 * eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 65, 500])
@pytest.mark.parametrize("correlation, scale", CASES)
def test_autocast_loses_nothing_beyond_the_features_rounding(
    correlation: float, scale: float, n: int, dtype: torch.dtype
) -> None:
    """Against float64 of the rounded features only float32's rounding is left, S included.

    Bounds: the logits, of size `scale`, carry an absolute error of a few eps * scale, and so does
    the relative error of every exponential; gradients in bf16 add their own last rounding.
    """
    x, y = (t.to(dtype) for t in correlated(n, 64, correlation, seed=n))
    rounded = [t.bfloat16().double() for t in (x, y)]
    truth = run_with_gradients(oracle_dense, *rounded, scale, False)
    ours = run_with_gradients(clip_loss, x, y, scale, True)
    eps = torch.finfo(torch.float32).eps
    relative = 8 * eps * max(scale, 1.0)
    assert abs(ours[0].double() - truth[0]) <= relative * max(truth[0].item(), 1e-30) + 8 * eps
    for got, want in zip(ours[1:3], truth[1:3], strict=True):
        last = torch.finfo(dtype).eps / 2
        assert (got.double() - want).norm() <= (relative + last) * want.norm()


def oracle_dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As `oracle`, vectorized: softplus of the negatives' log-sum-exp less the positive."""
    S = scale * x @ y.T
    negatives = S.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    if len(x) == 1:
        return 0 * S.sum()
    margins = [torch.logsumexp(negatives, dim) - S.diagonal() for dim in (0, 1)]
    return sum(torch.logaddexp(margin, torch.zeros_like(margin)).mean() for margin in margins) / 2


def test_nothing_square_is_saved() -> None:
    n, width = 2048, 16
    x, y = (features(n, width, seed, torch.float32).requires_grad_() for seed in (1, 2))
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scale = torch.tensor(10.0, requires_grad=True)
        clip_loss(x, y, scale, label_smoothing=0.1, keep_bytes=0)
    assert sum(saved) <= 2 * n * width + 30 * n
    assert max(saved) == n * width


def test_matrix_products_are_counted() -> None:
    n, m, width = 64, 96, 32
    x, y = features(n, width, 1).requires_grad_(), features(m, width, 2).requires_grad_()
    with count_products() as count:
        loss = clip_loss(x, y, 10.0, chunk_bytes=8 * m * 20, keep_bytes=0)
    assert count.products_of(n, m, width) == 1
    with count_products() as count:
        loss.backward()
    assert count.products_of(n, m, width) == 3
    with count_products() as count, torch.no_grad():
        clip_loss(x, y, 10.0)
    assert count.products_of(n, m, width) == 1
    frozen = clip_loss(x, y.detach(), 10.0, keep_bytes=0)
    with count_products() as count:
        frozen.backward()
    assert count.products_of(n, m, width) == 2


def test_flop_counter_sees_the_operator() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, y = features(32, 8, 1).requires_grad_(), features(32, 8, 2).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        clip_loss(x, y, 10.0, keep_bytes=0).backward()
    assert counter.get_total_flops() == 4 * 2 * 32 * 32 * 8


def test_same_bits_every_time() -> None:
    x, y = features(300, 24, 1, torch.float32), features(300, 24, 2, torch.float32)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        loss = clip_loss(*leaves, 30.0, chunk_bytes=4 * 300 * 64)
        loss.backward()
        return [loss.detach(), leaves[0].grad, leaves[1].grad]

    first = run()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast: bool) -> None:
    x, y = features(33, 8, 1, torch.float32), features(40, 8, 2, torch.float32)
    compiled = torch.compile(clip_loss, fullgraph=True)

    def run(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        scale = torch.tensor(20.0, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(*leaves, scale, label_smoothing=0.1)
        loss.backward()
        return [loss.detach(), leaves[0].grad, leaves[1].grad, scale.grad]

    for got, want in zip(run(compiled), run(clip_loss), strict=True):
        torch.testing.assert_close(got, want)


def test_nan_in_nan_out() -> None:
    for backend in BACKENDS:
        x, y = features(6, 4, 1), features(6, 4, 2)
        x[2, 1] = torch.nan
        assert torch.isnan(clip_loss(x, y, 10.0, backend=backend))
    assert torch.isnan(clip_loss(features(3, 4, 1), features(3, 4, 2), 10.0, torch.nan))


def test_bias_cancels() -> None:
    x, y = features(6, 4, 1), features(6, 4, 2)
    bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    loss = clip_loss(x, y, 10.0, bias)
    loss.backward()
    assert loss.item() == clip_loss(x, y, 10.0).item()
    assert bias.grad.item() == 0


def test_ties_and_zero_rows() -> None:
    x = features(1, 8, 1).expand(16, 8).contiguous()
    assert clip_loss(x, x, 100.0).item() == pytest.approx(math.log(16), abs=1e-12)
    zeros = torch.zeros(16, 8, dtype=torch.float64)
    assert clip_loss(zeros, x, 100.0).item() == pytest.approx(math.log(16), abs=1e-12)


def test_non_contiguous_features() -> None:
    x, y = features(12, 10, 1), features(12, 10, 2)
    strided = x.T.contiguous().T
    assert torch.equal(clip_loss(strided, y, 9.0), clip_loss(x, y, 9.0))


def test_chunks_are_even_and_within_the_budget() -> None:
    for rows, columns, budget in ((1000, 500, 100_000), (7, 3, 1), (8192, 8192, 16 << 20)):
        chunk = chunk_rows(rows, columns, 4, budget, "cpu")
        assert chunk == 1 or chunk * columns * 4 <= budget
        count = -(-rows // chunk)
        assert count * chunk - rows < count


X, Y = torch.ones(4, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, torch.ones(4, 5), 1.0), {}, "3 and 5 wide"),
        ((X, torch.ones(3, 3), 1.0), {}, "4 rows but only 3 columns"),
        ((X[:0], Y[:0], 1.0), {}, "at least one row"),
        ((X, Y.double(), 1.0), {}, "float32 and torch.float64"),
        ((X, Y.to("meta"), 1.0), {}, "cpu and meta"),
        ((X.int(), Y.int(), 1.0), {}, "floating point"),
        ((X[0], Y, 1.0), {}, r"shape \(3,\)"),
        ((X, Y, torch.ones(2)), {}, "logit_scale has shape"),
        ((X, Y, torch.ones((), device="meta")), {}, "logit_scale is on meta"),
        ((X, Y, 1.0), {"backend": "trition"}, "'trition' of similarity is unknown"),
        ((X, Y, 1.0), {"reduction": "avg"}, "reduction is 'avg'"),
        ((X, Y, 1.0), {"precision": "bf16"}, "precision is 'bf16'"),
        ((X, Y, 1.0), {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ((X, Y, 1.0), {"chunk_bytes": 0}, "chunk_bytes is 0"),
        ((X, Y, 1.0), {"row_group": torch.arange(4)}, "both row_group and column_group"),
        (
            (X, Y, 1.0),
            {"row_group": torch.arange(3), "column_group": torch.arange(4)},
            r"row_group has shape \(3,\)",
        ),
    ],
)
def test_bad_input_is_reported(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_loss(*arguments, **options)


def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "reference")
    with count_products() as count:
        similarity_statistics(X, Y, 1.0)
    # the dense reference makes its product itself
    assert count.calls == 0
    with count_products() as count:
        similarity_statistics(X, Y, 1.0, backend="torch")
    assert count.calls == 1


def test_towers_may_end_in_different_dtypes_under_autocast() -> None:
    x, y = features(8, 4, 1, torch.float32), features(8, 4, 2, torch.bfloat16)
    leaves = [x.requires_grad_(), y.requires_grad_()]
    for backend in BACKENDS:
        with torch.autocast("cpu", torch.bfloat16):
            loss = clip_loss(*leaves, 10.0, backend=backend)
        gradients = torch.autograd.grad(loss, leaves)
        assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]
    with pytest.raises(ValueError, match="cast them to one dtype"):
        clip_loss(*leaves, 10.0)
