"""A memory bank over two gloo ranks against lightly's."""

from pathlib import Path

import lightly.loss as lightly
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastclip
from tests.processes import on_ranks


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    ours = fastclip.NTXentLoss(0.2, (32, 8), gather_distributed=True)
    theirs = lightly.NTXentLoss(0.2, (32, 8), gather_distributed=True)
    theirs.memory_bank.bank = F.normalize(torch.randn(32, 8), dim=1)
    theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
    torch.manual_seed(1 + rank)
    values = []
    for _ in range(3):
        x, y = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
        values.append((ours(x, y).detach(), theirs(x, y).detach()))
    torch.save((values, ours.memory_bank.bank, theirs.memory_bank.bank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_bank_takes_the_keys_of_all_processes(tmp_path: Path) -> None:
    on_ranks(_rank, (str(tmp_path),), ranks=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for values, bank, wanted in ranks:
        torch.testing.assert_close(bank, wanted)
        for got, want in values:
            torch.testing.assert_close(got, want)
    assert torch.equal(ranks[0][1], ranks[1][1])
