"""What the operators promise and no loss asks of them: each input and each output alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import native
from fastclip.ops import schedule
from fastclip.ops.checks import as_table
from fastclip.ops.distillation import distillation
from fastclip.ops.gemm import count_products
from fastclip.ops.info_nce import info_nce_sum
from fastclip.ops.labels import label_statistics
from fastclip.ops.similarity import similarity_statistics
from fastclip.ops.symmetric import block_statistics
from fastclip.ops.tiles.base import Tile
from tests.ops.cases import LOSSES, pairwise, theirs, unit

FUSED = ("torch", *(() if native.unavailable_reason() else ("cpp",)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_each_input_alone_has_its_gradient(name: str, reduction: str) -> None:
    """Whatever else is frozen."""
    case = LOSSES[name].make(9, 5, 6.0, 0.3, seed=1, extra=2)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    oracle = LOSSES[name].oracle(*leaves, static=case.static)
    weights = torch.arange(1.0, 1.0 + len(oracle), dtype=torch.float64)
    wanted = theirs(name, case)[1:]
    if reduction == "none":
        wanted = torch.autograd.grad((oracle * weights).sum(), leaves)
    for index, want in enumerate(wanted):
        alone = [leaf.clone() for leaf in case.leaves]
        alone[index].requires_grad_()
        loss = LOSSES[name].run(alone, case.static, reduction=reduction, chunk_bytes=300)
        loss = (loss * weights).sum() if reduction == "none" else loss
        torch.testing.assert_close(torch.autograd.grad(loss, alone[index])[0], want)


X, Y, Z = unit(5, 4, 0), unit(7, 4, 1), unit(6, 4, 2)
SCALE, TABLE = torch.tensor(5.0, dtype=torch.float64), 3.0 + torch.eye(2, dtype=torch.float64)
LABELS = torch.tensor([1, 1, 1, 0, 2, 2])
TEACHER = [unit(5, 3, 3), unit(5, 3, 4), 2 * SCALE]


def _symmetric(table: Tensor) -> Tensor:
    """A table as the losses read it: gradients of (p, q) and (q, p) are one."""
    return as_table("table", table, 2, table)


# of each operator the inputs that may have a gradient, and which outputs have none
OPERATORS: dict[str, tuple[Callable[..., Any], list[Tensor], tuple[int, ...]]] = {
    "similarity": (
        lambda *inputs, **options: similarity_statistics(
            *inputs, means=True, maxima=True, **options
        ),
        [X, Y, SCALE],
        (1, 3),
    ),
    "blocks": (
        lambda z, scale, offset, **options: block_statistics(
            z, (0, 1), _symmetric(scale), _symmetric(offset), maxima=True, **options
        ),
        [Z, TABLE, -TABLE],
        (1,),
    ),
    "labels": (
        lambda z, scale, **options: label_statistics(z, LABELS, scale, **options),
        [Z, SCALE],
        (2,),
    ),
    "distillation": (
        lambda x, y, scale, **options: distillation(x, y, scale, *TEACHER, **options),
        [X, Y[:5], SCALE],
        (),
    ),
    "info_nce": (info_nce_sum, [X, Y, SCALE], (1,)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_output_alone_has_its_gradient(name: str) -> None:
    """Nobody uses the others: their upstream gradients are not there. Some have none at all."""
    operator, inputs, constant = OPERATORS[name]
    leaves = [leaf.clone().requires_grad_() for leaf in inputs]
    outputs = {backend: operator(*leaves, backend=backend) for backend in ("torch", "reference")}
    for index, pair in enumerate(zip(*outputs.values(), strict=True)):
        torch.testing.assert_close(*pair)
        assert all(one.requires_grad == (index not in constant) for one in pair)
        if index not in constant:
            found = [
                torch.autograd.grad(
                    (one * torch.arange(1, 1 + one.numel()).view(one.shape)).sum(),
                    leaves,
                    retain_graph=True,
                    materialize_grads=True,
                )
                for one in pair
            ]
            torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_rows_without_a_negative_column(backend: str) -> None:
    """All columns are positives alone: nothing of S is visited."""
    dtype = torch.float32 if backend == "cpp" else torch.float64
    options: dict[str, Any] = {"first_negative": 7, "backend": backend}

    def by_statistics(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        found = similarity_statistics(x, y, scale, column_statistics=False, **options)
        assert (found.row_lse == -torch.inf).all()
        return F.softplus(found.row_lse - found.positive).sum()

    for function in (by_statistics, lambda *inputs: info_nce_sum(*inputs, **options)[0]):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (X, Y, SCALE)]
        loss = function(*leaves)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("least, rows", [(1, 40), (160, 160)])
def test_strips_of_a_triangle_are_narrow(
    least: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strip's own square is made whole: with K strips one K-th more than half a product."""
    monkeypatch.setitem(schedule.LEAST_STRIP, "cpu", least)
    with count_products() as count:
        block_statistics(unit(640, 4, 0), (0, 1), TABLE)
    assert count.products_of(640, 640, 4) == 0.5 + 0.5 * rows / 640


def test_where_negatives_begin_is_checked() -> None:
    for first in (-1, 8):
        with pytest.raises(ValueError, match=f"negatives begin at column {first} of 7"):
            info_nce_sum(X, Y, 5.0, first_negative=first)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_index_of_positives_is_for_rows_alone(backend: str) -> None:
    index, group = torch.tensor([0, 6, 6, 2, 1]), torch.arange(7)
    groups = {"row_group": group[:5], "column_group": group, "column_statistics": False}
    for others in ({}, groups):
        with pytest.raises(ValueError, match="positive_index is for rows alone"):
            similarity_statistics(X, Y, 5.0, positive_index=index, backend=backend, **others)


@pytest.mark.parametrize("rows, columns", [(3, 4), (4, 3), (1, 1)])
def test_a_tile_knows_whether_its_diagonal_is_inside(rows: int, columns: int) -> None:
    scale = torch.ones(())
    for diagonal in range(-rows - 2, columns + 3):
        entries = torch.ones(rows, columns).tril(diagonal).triu(diagonal)
        tile = Tile(unit(rows, 2, 0), unit(columns, 2, 0), scale, None, diagonal)
        assert tile.crosses_diagonal == entries.any()
    assert not tile._replace(diagonal=None).crosses_diagonal


@pytest.mark.parametrize("name", ["siglip", "info_nce"])
def test_a_second_derivative_is_refused_when_the_graph_is_freed(name: str) -> None:
    """The last backward overwrites what the forward saved, but not one that makes a graph."""
    case = LOSSES[name].make(6, 3, 4.0, 0.3, seed=1)
    leaf = case.leaves[0].clone().requires_grad_()
    loss = LOSSES[name].run([leaf, *case.leaves[1:]], case.static)
    (dx,) = torch.autograd.grad(loss, leaf, create_graph=True, retain_graph=False)
    torch.testing.assert_close(dx, theirs(name, case)[1])
    with pytest.raises(RuntimeError, match="backend='reference'"):
        dx.sum().backward()


FACTORS: dict[str, list[Any]] = {
    "rows, columns": [(5, 7), (5, 5), (5, 3), (1, 1)],
    "column_statistics": [False, True],
    "positives": ["own", "indexed", "grouped"],
    "first_negative": [0, 2, 9],
    "columns_with_gradient": [None, 0, 2, 9],
    "means": [False, True],
}


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=0)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_statistics_with_any_options_are_the_references(case: dict[str, Any]) -> None:
    """Every two values of different options meet; what one refuses the other does."""
    options = dict(case)
    n, m = options.pop("rows, columns")
    for name in ("first_negative", "columns_with_gradient"):
        options[name] = min(options[name], m) if options[name] else options[name]
    positives = options.pop("positives")
    if positives == "indexed":
        options["positive_index"] = torch.arange(n) * 2 % m
    if positives == "grouped":
        options["column_group"] = torch.arange(m) % 3
        options["row_group"] = torch.arange(n) % 3
    results = []
    for backend in ("torch", "reference"):
        leaves = [unit(n, 4, 0), unit(m, 4, 1), SCALE]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        try:
            found = similarity_statistics(*leaves, backend=backend, chunk_bytes=100, **options)
        except ValueError as error:
            results.append(str(error))
            continue
        # what is not asked for is empty
        assert [len(found.row_mean), len(found.column_mean)] == [n * options["means"]] * 2
        assert len(found.column_lse) == n * options["column_statistics"]
        outputs = [found.row_lse, found.positive]
        outputs += [found.column_lse] if options["column_statistics"] else []
        outputs += [found.row_mean, found.column_mean] if options["means"] else []
        weights = torch.arange(1.0, 1 + n, dtype=torch.float64)
        # a row without negatives has -inf, and no gradient
        terms = [(out.masked_fill(out.isinf(), 0) * weights).sum() for out in outputs]
        total = sum(factor * term for factor, term in enumerate(terms, start=1))
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
        results.append([*(out.detach() for out in outputs), *gradients])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)
