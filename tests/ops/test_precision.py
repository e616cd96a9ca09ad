"""Exactness of every loss and implementation on a CPU, from float64 to 16 bits."""

import random
from itertools import product

import pytest
import torch

from fastclip import native
from tests.ops.cases import LOSSES, Case, check_error_rule, check_nan_shows, ours, theirs, views

BACKENDS = ("torch", "reference")
# float64 stays with torch; test_cpp.py says where the library is missing
LOW_PRECISION = (*BACKENDS, *(() if native.unavailable_reason() else ("cpp",)))
ROWS = (1, 2, 63, 65, 127, 129)
WIDTHS = (1, 16, 48, 77, 384, 512, 640, 1152)
SCALES = (0.1, 14.3, 100.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(name: str, case: Case, dtype: torch.dtype, autocast: bool, **options) -> None:
    """The error rule for one case."""
    low = case.cast(dtype)
    truth = theirs(name, low.double())
    eager = theirs(name, low, autocast=autocast)
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for backend in LOW_PRECISION:
        got = ours(name, low, autocast=autocast, backend=backend, **options)
        context = [backend, dtype, autocast, [tuple(t.shape) for t in case.leaves], options]
        assert got[0].dtype == torch.float32
        assert all(g.dtype == leaf.dtype for g, leaf in zip(got[1:], low.leaves, strict=True))
        check_error_rule(name, got, eager, truth, low, eps, context)


@pytest.mark.parametrize("name", LOSSES)
def test_every_border_in_low_precision(name: str) -> None:
    """All of ROWS x WIDTHS x DTYPES, with several chunks and more columns than rows.

    Scales take turns so that each meets every two values of different others.
    """
    count = 0
    sizes = product(enumerate(ROWS), enumerate(WIDTHS), enumerate(DTYPES))
    for (i, n), (j, width), (k, dtype) in sizes:
        scale = SCALES[(i + j + k) % len(SCALES)]
        case = LOSSES[name].make(n, width, scale, 0.3, seed=n + width, extra=5)
        keep = None if (n + width) % 2 else 0
        check(name, case, dtype, False, chunk_bytes=4 * n * 40, keep_bytes=keep)
        count += len(LOW_PRECISION)
    print(f"{name}: {count} cases")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_many_rows_and_wide_ones_in_low_precision(name: str) -> None:
    for (n, width), scale, dtype in product(((1000, 48), (300, 1152)), SCALES, DTYPES):
        case = LOSSES[name].make(n, width, scale, 0.3, seed=width, extra=24)
        check(name, case, dtype, False, chunk_bytes=4 * n * 130)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(15))
def test_random_cases_under_autocast(name: str, seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice([1, 3, 17, 65, 200])
    case = LOSSES[name].make(
        n,
        rng.choice([4, 31, 64, 130]),
        rng.choice([0.1, 1.0, 1 / 0.07, 100.0]),
        rng.choice([0.0, 0.3, 0.6]),
        seed=seed,
        extra=rng.choice([0, 1, 20]),
    )
    dtype = rng.choice([torch.float32, torch.bfloat16])
    chunk_bytes, keep_bytes = rng.choice([None, 1, 4 * n * 7]), rng.choice([None, 0])
    check(name, case, dtype, True, chunk_bytes=chunk_bytes, keep_bytes=keep_bytes)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(25))
def test_float64_equals_the_oracle(name: str, seed: int) -> None:
    """Bound: 1e-12 of a gradient's norm, or of what one anchor can contribute to it."""
    rng = random.Random(1000 + seed)
    n = rng.choice([1, 2, 3, 7, 16, 33, 64])
    scale = rng.choice([0.1, 1.0, 1 / 0.07, 100.0])
    case = LOSSES[name].make(
        n,
        rng.choice([1, 4, 16, 31]),
        scale,
        rng.choice([0.0, 0.3, 0.6]),
        seed=seed,
        extra=rng.choice([0, 0, 1, 5]),
    )
    want = theirs(name, case)
    size = 1 / float(case.leaves[-1]) ** 2 if case.is_temperature else max(scale, 1.0)
    for backend in BACKENDS:
        got = ours(
            name, case, backend=backend, chunk_bytes=rng.choice([1, 8 * 3 * n, 8 * 7 * n, None])
        )
        for mine, truth in zip(got, want, strict=True):
            assert mine.shape == truth.shape
            bound = 1e-12 * max(truth.norm().item(), size / n)
            if name == "siglip":
                bound *= n
            assert (mine - truth).norm().item() <= bound


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(name: str, reduction: str) -> None:
    """Per-anchor values and their own upstream gradients; "sum" adds them up."""
    case = LOSSES[name].make(12, 5, 9.0, 0.3, seed=3, extra=2)
    for backend in BACKENDS:
        results = []
        for run in ("ours", "theirs"):
            leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
            if run == "ours":
                options = {"reduction": reduction, "backend": backend, "chunk_bytes": 8 * 5 * 12}
                value = LOSSES[name].run(leaves, case.static, **options)
            else:
                value = LOSSES[name].oracle(*leaves, static=case.static)
                value = value.sum() if reduction == "sum" else value
            upstream = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape)
            gradients = torch.autograd.grad((value * upstream).sum(), leaves)
            results.append([value.detach(), *gradients])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


BORDERS = {
    "one anchor": {"n": 1},
    "two anchors": {"n": 2},
    "odd": {"n": 5, "extra": 1},
    "two chunks": {"n": 6, "chunk_bytes": 8 * 6 * 3},
    "a row a chunk": {"n": 4, "chunk_bytes": 1},
    "ties": {"n": 4},
    "zero rows": {"n": 4},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, border: str, backend: str) -> None:
    """PyTorch's defaults, every leaf, per anchor."""
    options = dict(BORDERS[border])
    n, extra = options.pop("n"), options.pop("extra", 0)
    case = LOSSES[name].make(n, 3, 5.0, 0.3, seed=n, extra=extra)
    for leaf in case.leaves[: case.features]:
        if border == "ties":
            leaf[:] = leaf[0].clone()
        if border == "zero rows":
            leaf[1:] = 0
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    for reduction in ("none", "mean"):

        def run(*leaves: torch.Tensor, reduction: str = reduction) -> torch.Tensor:
            return LOSSES[name].run(
                list(leaves), case.static, reduction=reduction, backend=backend, **options
            )

        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("correlation, scale", [(0.3, 14.3), (0.3, 100.0), (0.6, 100.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent", "mp_nce"])
def test_autocast_loses_only_float32s_rounding(
    name: str, dtype: torch.dtype, correlation: float, scale: float
) -> None:
    """Against float64 of the features as bf16 holds them, saturated case included.

    Logits of size `scale` carry a few eps * scale of absolute error, and so does the relative
    error of every exponential; gradients in bf16 add their own last rounding.
    """
    case = LOSSES[name].make(500, 64, scale, correlation, seed=1).cast(dtype)
    truth = theirs(name, case.cast(torch.bfloat16).double())
    got = ours(name, case, autocast=True)
    relative = 8 * torch.finfo(torch.float32).eps * max(scale, 1.0)
    assert abs(got[0].double() - truth[0]) <= relative * truth[0].abs() + 1e-30
    for mine, want in zip(got[1 : 1 + case.features], truth[1 : 1 + case.features], strict=True):
        last = torch.finfo(dtype).eps / 2
        assert (mine.double() - want).norm() <= (relative + last) * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_nan_out(name: str, backend: str) -> None:
    case = LOSSES[name].make(9, 4, 10.0, 0.3, seed=1)
    check_nan_shows(name, case, backend=backend, chunk_bytes=8 * 9 * 4)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_is_an_error(name: str) -> None:
    case = LOSSES[name].make(4, 3, 5.0, 0.3, seed=1)
    case.leaves[: case.features] = [leaf[:0] for leaf in case.leaves[: case.features]]
    if "labels" in case.static:
        case.static["labels"] = case.static["labels"][:0]
    with pytest.raises(ValueError, match="at least one row"):
        LOSSES[name].run(case.leaves, case.static)


def test_correlated_views_are_correlated() -> None:
    x, y = views(2, 400, 64, seed=1, correlation=0.6)
    assert abs((x * y).sum(1).mean() - 0.6) < 0.05
