"""FASTCLIP_CHECK_SIZES=1: uneven rows without `sizes` are an error on every process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastclip
from fastclip import functional
from fastclip.ops.collectives import CHECK_SIZES, gather_rows
from tests.processes import on_ranks

ROWS = (5, 3)


def _losses(rank: int, keys: int) -> dict[str, Callable[[], torch.Tensor]]:
    torch.manual_seed(rank)
    x, y, more = (F.normalize(torch.randn(n, 4), dim=1) for n in (ROWS[rank], ROWS[rank], keys))
    even = x[:3]
    labels = torch.arange(len(x))
    f = functional
    return {
        "clip": lambda: f.clip_loss(x, y, 9.0, dist="gather"),
        "clip ring": lambda: f.clip_loss(x, y, 9.0, dist="ring"),
        "clip keys": lambda: f.clip_loss(even, more, 9.0, dist="gather"),
        "siglip": lambda: f.siglip_loss(x, y, 9.0, dist="gather"),
        "info_nce": lambda: f.info_nce_loss(x, y, 9.0, dist="gather"),
        "info_nce keys": lambda: f.info_nce_loss(even, more, 9.0, dist="gather"),
        "mp_nce": lambda: f.mp_nce_loss([x, y], [0, 1], 9.0, dist="gather"),
        "nt_xent": lambda: f.nt_xent_loss(x, y, 0.1, dist="gather"),
        "sup_con": lambda: f.sup_con_loss(x, labels, 0.1, dist="gather"),
        "module": lambda: fastclip.ClipLoss(rank=rank, world_size=2, gather_with_grad=True)(
            x, y, torch.tensor(9.0)
        ),
        "gather_rows": lambda: gather_rows(x, with_grad=True),
        "wrong sizes": lambda: f.clip_loss(x, y, 9.0, dist="gather", sizes=ROWS[::-1]),
        "sizes of one": lambda: f.clip_loss(
            x, y, 9.0, dist="gather", sizes=ROWS if rank == 0 else None
        ),
    }


def _work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECK_SIZES, "1")
        for name, loss in _losses(rank, keys=4 + rank).items():
            with pytest.raises(ValueError) as error:
                loss()
            found[name] = str(error.value)
        x, y = (F.normalize(torch.randn(ROWS[rank], 4), dim=1) for _ in range(2))
        right = functional.clip_loss(x, y, 9.0, dist="gather", sizes=ROWS)
    without = functional.clip_loss(x, y, 9.0, dist="gather", sizes=ROWS)
    found["same with and without"] = torch.equal(right, without)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_every_rank_raises_and_names_sizes(tmp_path: Path) -> None:
    on_ranks(_work, (str(tmp_path),), ranks=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    # the same on both, so that none waits for the other
    assert first == second
    assert first.pop("same with and without")
    for name, message in first.items():
        if name.endswith("keys"):
            assert "the processes have (4, 5) columns" in message, name
            assert "the same number of columns a row" in message, name
        else:
            assert "the processes have (5, 3) rows" in message, name
            assert "give every rank's rows as sizes, the same on all" in message, name
