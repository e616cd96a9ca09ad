"""Biases of rows and columns in the similarity statistics, against their definition in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastclip import native
from fastclip.functional import similarity_statistics
from fastclip.ops.gemm import count_products
from fastclip.ops.numerics import softplus
from tests.ops import group_oracles
from tests.ops.cases import unit, views
from tests.processes import on_ranks

N, M, WIDTH, SCALE = 11, 14, 5, 9.0
NONE = torch.zeros(N, M, dtype=torch.bool)
BACKENDS = ("torch", "reference")
LOW = ["torch", "triton", *([] if native.unavailable_reason() else ["cpp"])]


def leaves(n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features, scale, and biases of rows and columns as far apart as logarithms of frequencies."""
    x, y = views(2, n, WIDTH, 3, 0.4)
    biases = [6 * unit(1, size, size)[0] for size in (n, m)]
    values = [x, torch.cat([y, unit(m - n, WIDTH, 7)]), torch.tensor(SCALE).double(), *biases]
    return [value.to(dtype).requires_grad_() for value in values]


def clip_terms(
    x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor, column_bias: Tensor, **options: Any
) -> Tensor:
    found = similarity_statistics(
        x, y, scale, row_bias=row_bias, column_bias=column_bias, **options
    )
    rows = softplus(found.row_lse - found.positive - column_bias[: len(x)])
    return rows + 3 * softplus(found.column_lse - found.positive - row_bias)


def compare(given: list[Tensor], got: Tensor, want: Tensor) -> None:
    weights = torch.arange(1, 1 + len(got), dtype=torch.float64) / len(got)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((one * weights).sum(), given) for one in (got, want)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_are_the_definitions(backend: str, keep_bytes: int | None) -> None:
    given = leaves()
    options = {"backend": backend, "keep_bytes": keep_bytes, "chunk_bytes": 300}
    compare(given, clip_terms(*given, **options), group_oracles.biased_clip(*given, NONE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_groups(backend: str) -> None:
    given, groups = leaves(), torch.arange(M) % 4
    got = clip_terms(*given, backend=backend, row_group=groups[:N], column_group=groups)
    compare(given, got, group_oracles.biased_clip(*given, groups[:N, None] == groups))


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_leaves_a_column_out(backend: str, keep_bytes: int | None) -> None:
    """A hard negative's: everything is as without it, and so are the exponentials that are kept."""
    x, y, scale, row_bias, column_bias = leaves()
    with torch.no_grad():
        column_bias[-2] = -torch.inf
    left = [*range(M - 2), M - 1]
    options = {"backend": backend, "keep_bytes": keep_bytes}
    got = clip_terms(x, y, scale, row_bias, column_bias, **options)
    want = clip_terms(x, y[left], scale, row_bias, column_bias[left], **options)
    given = [x, y, scale, row_bias, column_bias]
    compare(given, got, want)
    with count_products() as count:
        clip_terms(x, y, scale, row_bias, column_bias, **options).sum().backward()
    if backend != "reference":
        assert count.products_of(N, M, WIDTH) == (4 if keep_bytes == 0 else 3)
    assert column_bias.grad is not None and column_bias.grad[-2] == 0


def test_nothing_of_the_size_of_S_is_saved() -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        clip_terms(*leaves(), backend="torch", keep_bytes=0)
    assert 0 < max(saved) <= M * WIDTH < N * M


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_alone_with_positives_anywhere(backend: str) -> None:
    x, y, scale, _, column_bias = given = leaves()
    index = torch.arange(N).flip(0)
    found = similarity_statistics(
        x,
        y,
        scale,
        positive_index=index,
        column_bias=column_bias,
        column_statistics=False,
        maxima=True,
        backend=backend,
    )
    S = scale * x @ y.T + column_bias
    want = S.logsumexp(1) - S[torch.arange(N), index]
    given = [x, y, scale, column_bias]
    compare(given, softplus(found.row_lse - found.positive - column_bias[index]), want)
    own = torch.zeros_like(NONE).scatter(1, index[:, None], True)
    torch.testing.assert_close(found.row_max, S.detach().masked_fill(own, -torch.inf).amax(1))


def log_sum_exps(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor,
    column_bias: Tensor,
    left_out: Tensor,
) -> Tensor:
    """Of rows and columns, from the definition."""
    n = len(x)
    own = torch.eye(n, len(y), dtype=torch.bool)
    S = (scale * x @ y.T).masked_fill(own | left_out, -torch.inf)
    rows = (S + column_bias).logsumexp(1)
    return torch.cat([rows, (S[:, :n] + row_bias[:, None]).logsumexp(0)])


def within_roundings(got: list[Tensor], want: list[Tensor], exponent: float) -> None:
    """A fixed number of roundings: of results, and in float32 of exponents so large."""
    for mine, other in zip(got, want, strict=True):
        size = max(other.abs().max().item(), 0.1)
        roundings = 8 * torch.finfo(mine.dtype).eps + 8 * exponent * torch.finfo(torch.float32).eps
        assert (mine.double() - other).abs().max() <= roundings * size


# how far biases lie apart, whether some are -inf, whether there are groups. Of the last two float32
# does not hold all exponentials: about one anchor some lines have none, then all
KINDS = {
    "plain": (1, False, False),
    "masked": (1, True, True),
    "far": (25, True, False),
    "farther": (100, True, False),
}


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", LOW)
def test_every_implementation_has_them(
    backend: str, dtype: torch.dtype, kind: str, keep_bytes: int | None
) -> None:
    """Lines of several of Triton's tiles; a row, an own column and a hard negative at -inf."""
    n, m = 70, 150
    factor, masked, grouped = KINDS[kind]
    given = leaves(n, m, dtype)
    with torch.no_grad():
        for bias, at in zip(given[3:], ([5], [9, 80]), strict=True):
            bias *= factor
            if masked:
                bias[at] = -torch.inf
    groups = torch.arange(m) % 40 if grouped else torch.arange(m)
    left_out = groups[:n, None] == groups
    options = {"row_group": groups[:n], "column_group": groups} if grouped else {}
    weights = torch.arange(1.0, 1 + 2 * n) / n

    def terms(*inputs: Tensor) -> Tensor:
        x, y, scale, row_bias, column_bias = inputs
        found = similarity_statistics(
            x,
            y,
            scale,
            row_bias=row_bias,
            column_bias=column_bias,
            backend=backend,
            keep_bytes=keep_bytes,
            chunk_bytes=40 * m * 4,
            **options,
        )
        return torch.cat([found.row_lse, found.column_lse])

    wide = [leaf.detach().double().requires_grad_() for leaf in given]
    with count_products() as count:
        ours = terms(*given)
        of_ours = torch.autograd.grad((ours * weights).mean(), given)
    theirs = log_sum_exps(*wide, left_out)
    of_theirs = torch.autograd.grad((theirs * weights).mean(), wide)
    depth = sum(-b[b > -torch.inf].min().item() for b in wide[3:])
    within_roundings([ours, *of_ours], [theirs, *of_theirs], SCALE + depth)
    if not kind.startswith("far"):
        assert count.products_of(n, m, WIDTH) == (4 if keep_bytes == 0 else 3)


@pytest.mark.parametrize("backend", LOW)
def test_only_columns_have_biases_or_only_rows(backend: str) -> None:
    x, y, scale, row_bias, column_bias = leaves(70, 150, torch.float32)
    none = torch.zeros(70, 150, dtype=torch.bool)
    for keep_bytes in (0, None):
        for of_rows, of_columns in ((row_bias, None), (None, column_bias)):
            options = {"backend": backend, "keep_bytes": keep_bytes}
            found = similarity_statistics(
                x, y, scale, row_bias=of_rows, column_bias=of_columns, **options
            )
            given = [x, y, scale, column_bias if of_rows is None else row_bias]
            ours = torch.cat([found.row_lse, found.column_lse])
            biases = [
                torch.zeros(size) if bias is None else bias
                for size, bias in ((70, of_rows), (150, of_columns))
            ]
            wide = [leaf.detach().double().requires_grad_() for leaf in (x, y, scale, *biases)]
            theirs = log_sum_exps(*wide, none)
            asked = [*wide[:3], wide[4 if of_rows is None else 3]]
            got, want = (
                torch.autograd.grad(lses.mean(), by)
                for lses, by in ((ours, given), (theirs, asked))
            )
            within_roundings([ours, *got], [theirs, *want], SCALE + 6)


@pytest.mark.parametrize("backend", LOW)
def test_maxima_have_them(backend: str) -> None:
    x, y, scale, row_bias, column_bias = leaves(dtype=torch.float32)
    with torch.no_grad():
        column_bias[3], row_bias[4] = -torch.inf, -torch.inf
    found = similarity_statistics(
        x, y, scale, row_bias=row_bias, column_bias=column_bias, maxima=True, backend=backend
    )
    S = (scale * x @ y.T).masked_fill(torch.eye(N, M, dtype=torch.bool), -torch.inf)
    want = (S + column_bias).amax(1), (S[:, :N] + row_bias[:, None]).amax(0)
    torch.testing.assert_close(found.row_max, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.column_max, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", LOW)
def test_a_bias_far_below_does_not_vanish(backend: str) -> None:
    """Its exponential alone would: that of S is as far above."""
    x = torch.eye(3, dtype=torch.float32)
    y = torch.stack([x[0], -x[0], x[0]]).requires_grad_()
    bias = torch.tensor([0.0, 0.0, -104.0])
    found = similarity_statistics(
        x[:1], y, 55.0, column_bias=bias, column_statistics=False, backend=backend
    )
    want = torch.tensor([-49.0, -55.0]).logsumexp(0)
    torch.testing.assert_close(found.row_lse[0], want)


SIZES = (4, 1, 3)


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    n, results = sum(SIZES), {}
    for exchange, backend in (("gather", "torch"), ("ring", "torch"), ("gather", "reference")):
        own = [share(leaf.detach(), n, rank).requires_grad_() for leaf in leaves(n, 2 * n)]
        terms = clip_terms(*own, dist=exchange, backend=backend, sizes=SIZES, chunk_bytes=100)
        results[exchange, backend] = terms.detach(), torch.autograd.grad(terms.sum(), own)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def share(leaf: Tensor, n: int, rank: int) -> Tensor:
    """A rank's rows of each block; scalars as they are."""
    if leaf.ndim == 0:
        return leaf.clone()
    return torch.cat([block.split(SIZES)[rank] for block in leaf.split(n)])


@pytest.mark.dist
def test_ranks_equal_one_process(tmp_path: Path) -> None:
    on_ranks(work, (len(SIZES), str(tmp_path)), ranks=len(SIZES))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(len(SIZES))]
    n = sum(SIZES)
    given = leaves(n, 2 * n)
    want = group_oracles.biased_clip(*given, torch.zeros(n, 2 * n, dtype=torch.bool))
    gradients = torch.autograd.grad(want.sum(), given)
    for setting in ranks[0]:
        for rank, results in enumerate(ranks):
            terms, found = results[setting]
            torch.testing.assert_close(terms, share(want.detach(), n, rank), rtol=1e-12, atol=1e-12)
            for index in (0, 1, 3, 4):
                expected = share(gradients[index], n, rank)
                torch.testing.assert_close(found[index], expected, rtol=1e-12, atol=1e-12)
        total = sum(results[setting][1][2] for results in ranks)
        torch.testing.assert_close(total, gradients[2], rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    x, y, scale, row_bias, _ = leaves()

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            similarity_statistics(x, y, scale, **options)

    refused(r"column_bias has shape \(11,\); one a row, \(14,\)", column_bias=row_bias)
    refused("row_bias is torch.int64; give floating point", row_bias=row_bias.long())
    refused("row_bias is on meta, the features on cpu", row_bias=row_bias.to("meta"))
    refused("ask for column_statistics", row_bias=row_bias, column_statistics=False)
