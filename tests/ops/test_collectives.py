"""Rows and sums over ranks: rounded once, and differentiable as often as one likes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.losses import clip
from fastclip.nn.heads import GlobalBatchNorm
from fastclip.ops.collectives import gather_rows
from tests.processes import on_ranks

WORLD, ROWS, WIDTH = 4, 3, 5


def _drawn(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WORLD * ROWS, WIDTH, generator=generator, dtype=torch.float64)


def _second(loss: Any, own: Tensor, direction: Tensor) -> Tensor:
    """The gradient of the inner product of the loss's gradient and a direction."""
    (gradient,) = torch.autograd.grad(loss(own), own, create_graph=True)
    return torch.autograd.grad((gradient * direction).sum(), own)[0]


def _rank(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    own, direction, weights = (_drawn(seed).chunk(WORLD)[rank] for seed in range(3))
    found = {}

    # in bfloat16 256 + 1 is 256
    few = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((WORLD, 2), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    gather_rows(few, with_grad=True).backward(upstream)
    found["rounded once"] = few.grad

    leaf = own.clone().requires_grad_()
    found["gathered"] = _second(
        lambda x: (rank + 1) * (gather_rows(x, with_grad=True) ** 3).sum(), leaf, direction
    )
    norm = GlobalBatchNorm(WIDTH).double()
    leaf = own.clone().requires_grad_()
    found["normalized"] = _second(lambda x: (weights * norm(x) ** 2).sum(), leaf, direction)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_gradients_that_cross_ranks(tmp_path: Path) -> None:
    on_ranks(_rank, (str(tmp_path),), ranks=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for found in ranks:
        # 259 is half-way between 258 and 260, and 260 is the even one
        assert found["rounded once"].tolist() == [[260.0, 260.0]]
    own, direction, weights = (_drawn(seed) for seed in range(3))
    # the losses of the ranks are 1 to 4 times the sum of cubes
    gathered = torch.cat([found["gathered"] for found in ranks])
    torch.testing.assert_close(gathered, 10 * 6 * own * direction)
    norm = nn.BatchNorm1d(WIDTH).double()
    leaf = own.clone().requires_grad_()
    want = _second(lambda x: (weights * norm(x) ** 2).sum(), leaf, direction)
    got = torch.cat([found["normalized"] for found in ranks])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_a_scale_is_averaged_where_the_features_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL exchanges no CPU tensor; and 64 ranks' gradients do not add up in bfloat16."""
    averaged: list[Tensor] = []
    monkeypatch.setattr(clip, "average_gradient", lambda scale, group: averaged.append(scale))
    scale = torch.tensor(14.0, dtype=torch.bfloat16, requires_grad=True)
    features = torch.empty(2, 3, device="meta")
    clip.ClipLoss(world_size=2)._averaged(scale, features)
    assert averaged[0].device.type == "meta" and averaged[0].dtype == torch.float32
