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

    Examples:
        >>> import torch
        >>> from fastclip.losses.memory_bank import MemoryBank
        >>> queue = MemoryBank(size=4, width=2)
        >>> queue.enqueue(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> queue.bank[:2].tolist(), queue.position.item()
        ([[1.0, 0.0], [0.0, 1.0]], 2)
    """

    bank: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"a memory bank of {size} x {width}; both sides must be positive")
        self.register_buffer("bank", F.normalize(torch.randn(size, width), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def extra_repr(self) -> str:
        # what is shown in the brackets of the module's text
        size, width = self.bank.shape
        return f"size={size}, width={width}"

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Replace the oldest rows.

        Args:
            features: (N, width), normalized; of more than `size` the last stay.
        """
        size = self.bank.shape[0]
        newest = features.detach()[-size:].to(self.bank.dtype)
        rows = (self.position + torch.arange(len(newest), device=self.bank.device)) % size
        self.bank[rows] = newest
        self.position.copy_((self.position + len(newest)) % size)

    @torch.no_grad()
    def enqueue_of_all(self, keys: Tensor, group: ProcessGroup | None) -> None:
        """Enqueue the features of all processes, in their order.

        Args:
            keys: (N, width), this process's; N is the same in all.
            group: the process group; None: the default one.
        """
        keys = keys.detach().contiguous()
        parts = [torch.empty_like(keys) for _ in range(get_world_size(group))]
        all_gather(parts, keys, group=group)
        self.enqueue(torch.cat(parts))


def memory_bank(size: int | tuple[int, int]) -> MemoryBank | None:
    """The bank of a loss that takes `memory_bank_size`.

    Args:
        size: 0 for none, or (rows, width).

    Returns:
        The bank, or None.

    Raises:
        ValueError: a size without width, or numbers that make no sense.

    Examples:
        >>> from fastclip.losses.memory_bank import memory_bank
        >>> memory_bank((4096, 128)).bank.shape
        torch.Size([4096, 128])
        >>> memory_bank(0) is None
        True
    """
    if size == 0:
        return None
    if isinstance(size, int) or len(size) != 2:
        raise ValueError(f"memory_bank_size is {size}; give (rows, width), or 0 for none")
    return MemoryBank(*size)
