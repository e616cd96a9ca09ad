"""The distillation loss against its dense definition in float64, alone and over two processes."""

import itertools
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.functional import distillation_loss
from fastclip.ops.distillation import distillation
from fastclip.ops.gemm import count_products
from tests.ops.cases import unit
from tests.processes import on_ranks

SCALE, TEACHER_SCALE = 11.0, 30.0
SIZES = (7, 4)


def features(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images and texts of a student and of a wider teacher, 11 pairs."""
    return [unit(sum(SIZES), width, seed).to(dtype) for seed, width in enumerate((5, 5, 8, 8))]


def definition(x: Tensor, y: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of each pair: the mean of -sum_j t_ij log s_ij over its row and its column."""
    S, T = scale * x @ y.T, TEACHER_SCALE * u @ v.T
    terms = []
    for dim in (1, 0):
        s, t = S.exp() / S.exp().sum(dim, keepdim=True), T.exp() / T.exp().sum(dim, keepdim=True)
        terms.append(-(t * s.log()).sum(dim))
    return (terms[0] + terms[1]) / 2


def student(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    x, y, u, v = features(dtype)
    scale = torch.tensor(SCALE, dtype=dtype)
    return [t.requires_grad_() for t in (x, y, scale)], [u, v]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_is_its_definition(backend: str, reduction: str) -> None:
    leaves, teacher = student()
    options: dict[str, Any] = {"backend": backend, "reduction": reduction, "chunk_bytes": 200}
    found = distillation_loss(*leaves, *teacher, TEACHER_SCALE, **options)
    each = definition(*leaves, *teacher)
    wanted = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    gradients = [torch.autograd.grad(one, leaves, upstream) for one in (found, wanted)]
    torch.testing.assert_close(*map(list, gradients), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_open_clips(dtype: torch.dtype) -> None:
    leaves, teacher = student(dtype)
    found = distillation_loss(*leaves, *teacher, TEACHER_SCALE)
    theirs = open_clip.loss.DistillClipLoss()(*leaves, *teacher, torch.tensor(TEACHER_SCALE))[1]
    assert found.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours, wanted = (torch.autograd.grad(one, leaves) for one in (found, theirs))
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_rows_alone_of_any_number_of_columns() -> None:
    (x, y, scale), (u, v) = student()
    rows = slice(2, 6)
    with count_products() as counted:
        row, column = distillation(x[rows], y, scale, u[rows], v, TEACHER_SCALE, columns=False)
        row.sum().backward()
    assert column.shape == (0,)
    # S and T forward; S, T, dX and dY backward
    assert counted.flop == 2 * 4 * 11 * (4 * 5 + 2 * 8)
    S, T = SCALE * x.detach() @ y.detach().T, TEACHER_SCALE * u @ v.T
    wanted = -(T.softmax(1) * S.log_softmax(1)).sum(1)[rows]
    torch.testing.assert_close(row.detach(), wanted, rtol=1e-12, atol=1e-12)


def work(rank: int, folder: str) -> None:
    """One process's values and gradients, by exchange and reduction."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    results = {}
    for exchange, reduction in itertools.product(("gather", "ring"), ("mean", "sum", "none")):
        x, y, u, v = (t[own].clone() for t in features())
        leaves = [t.requires_grad_() for t in (x, y, torch.tensor(SCALE, dtype=torch.float64))]
        loss = distillation_loss(
            *leaves, u, v, TEACHER_SCALE, reduction=reduction, dist=exchange, sizes=SIZES
        )
        gradients = torch.autograd.grad(loss.sum(), leaves)
        results[exchange, reduction] = [loss.detach(), *gradients]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_equal_one(tmp_path: Path) -> None:
    on_ranks(work, (str(tmp_path),), ranks=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    leaves, teacher = student()
    each = definition(*leaves, *teacher)
    for key in found[0]:
        whole = {"mean": each.mean(), "sum": each.sum(), "none": each.sum()}[key[1]]
        wanted = torch.autograd.grad(whole, leaves, retain_graph=True)
        of_ranks = [result[key] for result in found]
        if key[1] == "none":
            # the sum over all processes, which nobody averages
            torch.testing.assert_close(torch.cat([r[0] for r in of_ranks]), each.detach())
            factor, scale = 1, of_ranks[0][3] + of_ranks[1][3]
        else:
            for result in of_ranks:
                torch.testing.assert_close(result[0], whole.detach(), rtol=1e-12, atol=1e-12)
            factor, scale = 2, (of_ranks[0][3] + of_ranks[1][3]) / 2
        for side in (1, 2):
            joined = torch.cat([result[side] for result in of_ranks])
            torch.testing.assert_close(joined, factor * wanted[side - 1], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(scale, wanted[2], rtol=1e-10, atol=1e-13)


def test_it_keeps_no_matrix_and_compiles() -> None:
    leaves, teacher = student()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        loss = distillation_loss(*leaves, *teacher, TEACHER_SCALE, chunk_bytes=100)
    assert kept and max(kept) <= 11 * 8
    compiled = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    found = compiled(*leaves, *teacher, TEACHER_SCALE)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: unit(9, 5, 0)}, "11 images and 9 texts; distillation is of pairs"),
        ({2: unit(9, 8, 0), 3: unit(9, 8, 0)}, "student and teacher have"),
        ({2: unit(11, 8, 0).requires_grad_()}, "the teacher requires a gradient"),
    ],
)
def test_what_does_not_fit(change: dict[int, Tensor], message: str) -> None:
    given = [change.get(place, t) for place, t in enumerate(features())]
    with pytest.raises(ValueError, match=message):
        distillation_loss(*given[:2], SCALE, *given[2:], TEACHER_SCALE)
