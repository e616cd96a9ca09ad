"""float16 gradients that are formed in the forward travel wide: no loss scale is on them yet."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastclip import functional
from tests.ops import oracles
from tests.processes import on_ranks

ROWS, WIDTH, LOSS_SCALE = 8, 16, 2.0**20
LOSSES = {"siglip": (40.0, -20.0), "info_nce": (20.0,)}
# weights are no loss scale
WEIGHTS = (None, 1.0)


def _features() -> list[Tensor]:
    """Rows at right angles: each pair of different samples has a gradient of about 1e-7.

    The smallest float16 number is 6e-8: rounded to multiples of it, it would be off by a quarter.
    """
    return [torch.eye(ROWS, WIDTH, dtype=torch.float64) for _ in range(2)]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, scalars in LOSSES.items():
        for exchange, weight in product(("gather", "ring"), WEIGHTS):
            own = [f.half().chunk(2)[rank].clone().requires_grad_() for f in _features()]
            weights = None if weight is None else torch.full((ROWS // 2,), weight)
            loss = getattr(functional, f"{name}_loss")
            loss = loss(*own, *scalars, weights=weights, dist=exchange)
            gradients = torch.autograd.grad(loss * LOSS_SCALE, own)
            # all ranks' rows count the loss, so that averaging gives the whole batch's gradient
            found[name, exchange, weight] = [g.double() / LOSS_SCALE / 2 for g in gradients]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_small_gradients_of_float16_features_arrive(tmp_path: Path) -> None:
    on_ranks(_rank, (str(tmp_path),), ranks=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, scalars in LOSSES.items():
        leaves = [f.requires_grad_() for f in _features()]
        numbers = [torch.tensor(v, dtype=torch.float64) for v in scalars]
        loss = getattr(oracles, name)(*leaves, *numbers, static={}).mean()
        for exchange, weight in product(("gather", "ring"), WEIGHTS):
            for side, want in enumerate(torch.autograd.grad(loss, leaves, retain_graph=True)):
                got = torch.cat([r[name, exchange, weight][side] for r in ranks])
                small = ~torch.eye(ROWS, WIDTH, dtype=torch.bool) & (want != 0)
                assert small.any()
                error = (got - want)[small].abs() / want[small].abs()
                # one rounding to the input's dtype
                assert error.max() <= torch.finfo(torch.float16).eps, (name, exchange, weight, side)
