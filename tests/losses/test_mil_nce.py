"""MIL-NCE against a loop over anchors in float64, on one rank and on two."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastclip import native
from fastclip.functional import mil_nce_loss, mp_nce_loss
from fastclip.ops.gemm import count_products
from tests.ops.cases import views
from tests.processes import on_ranks

DOMAINS = {"pair": [0, 1], "views": [0, 0, 1], "texts": [0, 1, 0, 1], "three": [2, 0, 1]}
WIDTH = 6
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
LOW = ["triton", *([] if native.unavailable_reason() else ["cpp", "auto"])]


def inputs(domains: list[int], rows: int) -> list[Tensor]:
    """Blocks, and tables of scales and offsets by domain pair."""
    spread = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(rows)).double()
    tables = [9 * (0.75 + 0.25 * spread[0]), spread[1] - 0.5]
    return [*views(len(domains), rows, WIDTH, 3, 0.4), *tables]


def slow(leaves: list[Tensor], domains: list[int], group: Tensor | None = None) -> Tensor:
    """The loss of each anchor."""
    *blocks, scale, offset = leaves
    rows = [
        (k, d, z) for block, d in zip(blocks, domains, strict=True) for k, z in enumerate(block)
    ]
    losses = []
    for i, (pair, p, x) in enumerate(rows):
        good, bad = [], []
        for j, (other, q, y) in enumerate(rows):
            entry = min(p, q), max(p, q)
            logit = scale[entry] * (x @ y) + offset[entry]
            if other == pair and i != j:
                good.append(logit)
            elif other != pair and (group is None or group[other] != group[pair]):
                bad.append(logit)
        both = torch.stack(good + bad)
        losses.append(both.logsumexp(0) - torch.stack(good).logsumexp(0))
    return torch.stack(losses)


def with_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def leaves_of(values: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [value.to(dtype).requires_grad_() for value in values]


def ours(leaves: list[Tensor], domains: list[int], **options: Any) -> Tensor:
    *blocks, scale, offset = leaves
    return mil_nce_loss(blocks, domains, scale, offset, **options)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", DOMAINS)
def test_values_and_gradients(name: str, backend: str) -> None:
    domains = DOMAINS[name]
    leaves = leaves_of(inputs(domains, 7))
    # by a chunk of a few rows at a time
    got = with_gradients(ours(leaves, domains, backend=backend, chunk_bytes=300), leaves)
    for mine, want in zip(got, with_gradients(slow(leaves, domains).mean(), leaves), strict=True):
        torch.testing.assert_close(mine, want, **CLOSE)


@pytest.mark.parametrize("backend", LOW)
def test_in_float32(backend: str) -> None:
    domains, values = DOMAINS["views"], inputs(DOMAINS["views"], 9)
    leaves, wide = leaves_of(values, torch.float32), leaves_of(values)
    got = with_gradients(ours(leaves, domains, backend=backend), leaves)
    for mine, want in zip(got, with_gradients(slow(wide, domains).mean(), wide), strict=True):
        # logits of 9 in float32, a few roundings each
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)
        assert mine.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_groups_weights_and_reductions(reduction: str) -> None:
    domains = DOMAINS["views"]
    leaves = leaves_of(inputs(domains, 8))
    group = torch.tensor([4, 1, 4, -2, 0, 1, 4, 9])
    weights = (torch.arange(24) % 5 / 4).double().requires_grad_()
    upstream = torch.arange(1.0, 25.0).double()
    terms = weights * slow(leaves, domains, group)
    want = {"mean": terms.sum() / weights.sum(), "sum": terms.sum(), "none": terms @ upstream}
    options = {"row_group": group, "weights": weights, "reduction": reduction, "backend": "torch"}
    got = ours(leaves, domains, **options)
    assert got.shape == ((24,) if reduction == "none" else ())
    got = got @ upstream if reduction == "none" else got
    every = [*leaves, weights]
    for mine, other in zip(
        with_gradients(got, every), with_gradients(want[reduction], every), strict=True
    ):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_with_one_positive_it_is_mp_nce() -> None:
    x, y, scale, offset = inputs([0, 1], 6)
    got = mil_nce_loss([x, y], [0, 1], scale, offset, reduction="none")
    torch.testing.assert_close(
        got, mp_nce_loss([x, y], [0, 1], scale, offset, reduction="none"), **CLOSE
    )


def test_a_pair_alone_and_saturated_positives() -> None:
    """No negatives: nothing to learn. Far above all negatives: small losses keep their digits."""
    blocks = leaves_of([torch.eye(4)[:1]] * 3)
    loss = mil_nce_loss(blocks, [0, 0, 1], 9.0)
    loss.backward()
    assert loss.item() == 0.0 and all(block.grad.abs().max() == 0 for block in blocks)
    eye = torch.eye(4).double()
    # two positives at 60 beside 9 negatives at 0
    got = mil_nce_loss([eye, eye, eye], [0, 0, 1], 60.0)
    want = 4.5 * torch.exp(got.new_tensor(-60.0))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)


def test_products_and_memory_are_those_of_mp_nce() -> None:
    """Half a product of all rows forward, one and a half backward; S is not saved."""
    domains, rows = DOMAINS["views"], 200
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    counts = []
    for loss in (mil_nce_loss, mp_nce_loss):
        *blocks, scale, offset = leaves_of(inputs(domains, rows))
        with (
            count_products() as count,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            options: dict[str, Any] = {"backend": "torch", "keep_bytes": 0}
            loss(blocks, domains, scale, offset, **options).backward()
        counts.append(count.flop)
    assert counts[0] == counts[1] > 0
    assert 0 < max(saved) <= 3 * rows * WIDTH


def test_mistakes_are_reported() -> None:
    x = torch.eye(4)
    for arguments, options, message in [
        (([x], [0]), {}, "1 block; an anchor's positives"),
        (([x, x], [0]), {}, "2 blocks but 1 domains"),
        (([x, x[:3]], [0, 1]), {}, r"block 1 is \(3, 4\)"),
        (([x, x], [0, 1]), {"weights": torch.ones(4)}, r"one an anchor, \(8,\)"),
        (([x, x], [0, 1]), {"row_group": torch.ones(3).long()}, "row_group"),
        (([x, x], [0, 1]), {"reduction": "median"}, "reduction is 'median'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mil_nce_loss(*arguments, 9.0, **options)
    with pytest.raises(ValueError, match="P = 3 domains"):
        mil_nce_loss([x, x], [0, 2], torch.ones(2, 2))


SIZES = (5, 2)
GROUP = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", len(SIZES))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    *blocks, scale, offset = inputs(DOMAINS["views"], sum(SIZES))
    own = [block.split(SIZES)[rank] for block in blocks]
    found = {}
    for exchange in ("gather", "ring"):
        for reduction in ("mean", "none"):
            leaves = leaves_of([*own, scale, offset])
            loss = ours(
                leaves,
                DOMAINS["views"],
                row_group=GROUP.split(SIZES)[rank],
                dist=exchange,
                sizes=SIZES,
                reduction=reduction,
            )
            gradients = torch.autograd.grad(loss.sum(), leaves)
            found[exchange, reduction] = loss.detach(), gradients
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_are_one(tmp_path: Path) -> None:
    on_ranks(work, (str(tmp_path),), ranks=len(SIZES))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(len(SIZES))]
    leaves = leaves_of(inputs(DOMAINS["views"], sum(SIZES)))
    of_anchors = slow(leaves, DOMAINS["views"], GROUP)
    for reduction, total in (("mean", of_anchors.mean()), ("none", of_anchors.sum())):
        wanted = torch.autograd.grad(total, leaves, retain_graph=True)
        # a feature's gradient is the number of ranks times the mean's
        factor = len(SIZES) if reduction == "mean" else 1
        for exchange in ("gather", "ring"):
            results = [found[exchange, reduction] for found in ranks]
            for rank, (value, gradients) in enumerate(results):
                blocks = of_anchors.detach().split(sum(SIZES))
                own = torch.cat([block.split(SIZES)[rank] for block in blocks])
                want = own if reduction == "none" else total.detach()
                torch.testing.assert_close(value, want, **CLOSE)
                for got, whole in zip(gradients[:3], wanted[:3], strict=True):
                    torch.testing.assert_close(got, factor * whole.split(SIZES)[rank], **CLOSE)
            for index in (3, 4):
                summed = sum(gradients[index] for _, gradients in results) / factor
                torch.testing.assert_close(summed, wanted[index], **CLOSE)
