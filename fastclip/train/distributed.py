"""Data-parallel processes, as torchrun or deepspeed starts them; one alone is a world of one."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastclip.device import choose_device

WAIT = timedelta(hours=2)


class DeadRankError(RuntimeError):
    """Another rank has ended or gives no heartbeat."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # after the first step gradients lie in the buckets that are reduced: no copy of them
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True
        )

    def join_alone(self) -> None:
        """Make a process group of one, where there is none: what shards parameters wants one."""
        if not dist.is_initialized():
            # by which DeepSpeed chooses the GPU
            os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=WAIT)

    def gather(self, value: Any) -> list[Any]:
        """One small value (tensors, numbers, text, nested) of every rank, on all ranks."""
        if self.size == 1:
            return [value]
        # as bytes: pickling tensors is what checkpoints do, and what all releases can read
        buffer = io.BytesIO()
        torch.save(value, buffer)
        encoded: list[bytes] = [b""] * self.size
        dist.all_gather_object(encoded, buffer.getvalue())
        return [torch.load(io.BytesIO(one), weights_only=True) for one in encoded]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank, on all ranks."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag), dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end.

    Args:
        device: "auto", "cpu", "cuda"; with several processes each takes the GPU of its LOCAL_RANK.

    Raises:
        ValueError: the device cannot be used, or there are more processes than GPUs here.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise ValueError(
            f"WORLD_SIZE is {size} but RANK or LOCAL_RANK is not set: start with torchrun, or "
            "unset WORLD_SIZE"
        )
    chosen = choose_device(device)
    if size == 1:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        joined = dist.is_initialized()
        try:
            yield World(0, 1, chosen)
        finally:
            # one that was made for sharding
            if dist.is_initialized() and not joined:
                dist.destroy_process_group()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: there are {torch.cuda.device_count()}; "
                "lower torchrun's --nproc_per_node"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    # the first rank evaluates while the others wait, which may take longer than NCCL's ten minutes;
    # a rank that dies is noticed by `watch.py`, not by this
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield World(rank, size, chosen)
    except DeadRankError:
        # a group with a dead member may not close
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    # a rank that has left may still be in another's last exchange
    dist.barrier()
    dist.destroy_process_group()
