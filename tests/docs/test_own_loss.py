"""The losses that a page builds outside the package, against their definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.ops.gemm import count_products
from tests.docs.pages import READ
from tests.ops.cases import unit
from tests.processes import on_ranks

NAME = "decoupled_contrastive_loss"


def from_the_page(name: str = NAME) -> Callable[..., Tensor]:
    """The function as a reader copies it."""
    (block,) = (b for page in READ for b in page.blocks("python") if f"def {name}" in b.text)
    text = block.text[: block.text.index(f"\n{name}(")]
    assert len(text.strip().splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(compile(text, "page", "exec"), names)
    return names[name]


def definition(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """-S_ii + log of the sum over the others of exp(S_ij), rows and columns, in the mean."""
    S = scale * images @ texts.T
    others = S.masked_fill(torch.eye(len(S), dtype=torch.bool), -torch.inf)
    terms = [others.logsumexp(dim) - S.diagonal() for dim in (1, 0)]
    return (terms[0] + terms[1]).mean() / 2


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_is_its_definition(backend: str) -> None:
    loss = from_the_page()
    leaves = [unit(9, 5, 0), unit(9, 5, 1), torch.tensor(7.0, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with count_products() as counted:
        found = loss(*leaves, backend=backend)
        ours = torch.autograd.grad(found, leaves)
    wanted = definition(*leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        list(ours), list(torch.autograd.grad(wanted, leaves)), rtol=1e-10, atol=1e-12
    )
    if backend == "torch":
        assert counted.products_of(9, 9, 5) == 3


def check(loss: Callable[..., Tensor], want: Callable[..., Tensor], *leaves: Tensor) -> None:
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    found, wanted = loss(*given), want(*given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(one, given) for one in (found, wanted)]
    torch.testing.assert_close(*map(list, gradients), rtol=1e-10, atol=1e-12)


def test_keys_that_are_drawn_often_count_less() -> None:
    chance = torch.linspace(0.01, 0.9, 11, dtype=torch.float64)

    def corrected(query: Tensor, keys: Tensor, scale: Tensor, chance: Tensor) -> Tensor:
        S = scale * query @ keys.T - chance.log()
        return torch.nn.functional.cross_entropy(S, torch.arange(len(S)))

    scale = torch.tensor(7.0, dtype=torch.float64)
    loss = from_the_page("corrected_info_nce_loss")
    check(loss, corrected, unit(9, 5, 0), unit(11, 5, 1), scale, chance)


def test_negatives_of_the_querys_class_are_taken_off() -> None:
    """Both where the estimate of their mean is above its bound, and where it is not."""
    query, keys = unit(9, 5, 0), unit(9, 5, 1)
    query[:4] = keys[:4]
    bounds = []

    def debiased(query: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        E = (scale * query @ keys.T).exp()
        others = E.masked_fill(torch.eye(9, dtype=torch.bool), 0.0).sum(1)
        estimate = (others / 8 - 0.2 * E.diagonal()) / 0.8
        bounds.extend((estimate < (-scale).exp()).tolist())
        left = torch.maximum(estimate, (-scale).exp())
        return -(E.diagonal() / (E.diagonal() + 8 * left)).log().mean()

    loss = from_the_page("debiased_info_nce_loss")
    scale = torch.tensor(7.0, dtype=torch.float64)
    check(lambda *given: loss(*given, 0.2), debiased, query, keys, scale)
    assert len(set(bounds)) == 2


def share(rank: int, path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2
    )
    loss = from_the_page()
    own = slice(4 * rank, 4 * rank + 4)
    leaves = [unit(8, 5, seed)[own].requires_grad_() for seed in (0, 1)]
    loss(*leaves, 7.0, dist="gather").backward()
    torch.save([leaf.grad for leaf in leaves], path / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_over_processes_it_has_the_whole_gradient(tmp_path: Path) -> None:
    on_ranks(share, (tmp_path,), ranks=2)
    leaves = [unit(8, 5, seed).requires_grad_() for seed in (0, 1)]
    wanted = torch.autograd.grad(definition(*leaves, torch.tensor(7.0)), leaves)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for index, whole in enumerate(wanted):
        # data-parallel training averages over the two
        ours = torch.cat([gradients[index] for gradients in found]) / 2
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)
