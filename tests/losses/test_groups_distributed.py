"""Groups and weights over several gloo ranks with unequal shares, against the definitions."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.losses.test_groups import CASES, LOSSES, triangle
from tests.ops import group_oracles
from tests.ops.cases import unit, views
from tests.processes import on_ranks

SIZES = {2: (5, 2), 3: (3, 1, 4)}
WIDTH, SCALE = 5, 8.0
SETTINGS = {
    2: [("gather", "reference", "mean")],
    3: [("gather", "torch", "mean"), ("ring", "torch", "none")],
}


def whole(name: str, world: int) -> tuple[list[Tensor], int, dict[str, Tensor]]:
    """Leaves, weights the last; how many of them are features; groups that cross the ranks."""
    rows = sum(SIZES[world])
    loss = LOSSES[name]
    scalars = loss.leaves()[loss.features :]
    features = views(loss.features, rows, WIDTH, world, 0.4)
    group = torch.arange(rows) % 3
    group[1] = 7
    groups = {"row_group": group}
    if "column_group" in loss.groups:
        groups["column_group"] = group.clone()
        groups["column_group"][-1] = 9
    if name == "clip":
        # a hard negative for each pair, some of a group
        features[1] = torch.cat([features[1], unit(rows, WIDTH, 31)])
        groups["column_group"] = torch.cat([groups["column_group"], group.flip(0) + 1])
    blocks = {"nt_xent": 2, "mp_nce": 3}.get(name, 1)
    weights = torch.arange(blocks * rows, dtype=torch.float64) % 4 / 4 + 0.25
    return [*features, *scalars, weights], loss.features, groups


def cut(rows: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """A rank's share of each block."""
    return torch.cat([block.split(sizes)[rank] for block in rows.split(sum(sizes))])


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    sizes, results = SIZES[world], {}
    for (name, role), setting in product(CASES, SETTINGS[world]):
        exchange, backend, reduction = setting
        leaves, features, groups = whole(name, world)
        last = len(leaves) - 1
        own = [
            cut(leaf, sizes, rank) if index < features or index == last else leaf.clone()
            for index, leaf in enumerate(leaves)
        ]
        *inputs, weights = [leaf.requires_grad_() for leaf in own]
        options: dict[str, Any] = {"dist": exchange, "backend": backend, "reduction": reduction}
        options |= {key: cut(ids, sizes, rank) for key, ids in groups.items()}
        value = LOSSES[name].run(
            *inputs, weights=weights, group_role=role, sizes=sizes, chunk_bytes=100, **options
        )
        gradients = torch.autograd.grad(value.sum(), [*inputs, weights])
        results[name, role, setting] = value.detach(), gradients
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("world", SIZES)
def test_ranks_equal_one_process(world: int, tmp_path: Path) -> None:
    on_ranks(work, (world, str(tmp_path)), ranks=world)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    sizes = SIZES[world]
    for name, role in CASES:
        leaves, features, groups = whole(name, world)
        *inputs, weights = [leaf.requires_grad_() for leaf in leaves]
        of_anchors = LOSSES[name].oracle(*inputs, groups=tuple(groups.values()), role=role)
        mean = group_oracles.weighted_mean(of_anchors, weights)
        wanted = {
            "mean": torch.autograd.grad(mean, leaves, retain_graph=True),
            "none": torch.autograd.grad((of_anchors * weights).sum(), leaves),
        }
        for setting in SETTINGS[world]:
            reduction = setting[2]
            # a feature's gradient is the number of ranks times the mean's
            factor = world if reduction == "mean" else 1
            for rank in range(world):
                value, gradients = ranks[rank][name, role, setting]
                want = mean if reduction == "mean" else cut(of_anchors * weights, sizes, rank)
                torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=1e-12)
                for index in (*range(features), -1):
                    want = factor * cut(wanted[reduction][index], sizes, rank)
                    torch.testing.assert_close(gradients[index], want, rtol=1e-12, atol=1e-12)
            for index in range(features, len(leaves) - 1):
                total = sum(r[name, role, setting][1][index] for r in ranks) / factor
                want = triangle(wanted[reduction][index], name)
                torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
