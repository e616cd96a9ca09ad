"""A queue of past features that serve as negatives (MoCo, He et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_gather, get_world_size


class MemoryBank(nn.Module):
    """The last `size` features, first in, first out; kept in checkpoints.

    Args:
        size, width: rows and feature width, both > 0. The queue begins with random unit vectors.

    Raises:
        ValueError: a side that is not positive.
    """

    bank: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"a memory bank of {size} x {width}; both sides must be positive")
        self.register_buffer("bank", F.normalize(torch.randn(size, width), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Replace the oldest rows by `features` (N, width); of more than `size` the last stay."""
        size = self.bank.shape[0]
        newest = features.detach()[-size:].to(self.bank.dtype)
        rows = (self.position + torch.arange(len(newest), device=self.bank.device)) % size
        self.bank[rows] = newest
        self.position.copy_((self.position + len(newest)) % size)

    @torch.no_grad()
    def enqueue_of_all(self, keys: Tensor, group: ProcessGroup | None) -> None:
        """Enqueue the `keys` (N, width) of all processes, in their order; N is the same in all."""
        keys = keys.detach().contiguous()
        parts = [torch.empty_like(keys) for _ in range(get_world_size(group))]
        all_gather(parts, keys, group=group)
        self.enqueue(torch.cat(parts))


def memory_bank(size: int | tuple[int, int]) -> MemoryBank | None:
    """The bank of a loss: 0 for none, or (rows, width).

    Raises:
        ValueError: a size without width, or numbers that make no sense.
    """
    if size == 0:
        return None
    if isinstance(size, int) or len(size) != 2:
        raise ValueError(f"memory_bank_size is {size}; give (rows, width), or 0 for none")
    return MemoryBank(*size)
