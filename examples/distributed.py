"""Plain PyTorch over several processes: every pair of the global batch is compared, exactly.

    torchrun --nproc_per_node 2 examples/distributed.py

With `dist="gather"` each process compares its images with all texts; DistributedDataParallel's
averaging then gives the full batch's gradient. The script compares it, on every process, with that
of one process that has the whole batch. On GPUs take "nccl" and put model and data on one each.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastclip.functional import clip_loss

BATCH, WIDTH = 64, 16


class TwoEncoders(nn.Module):
    """Stands for yours."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = F.normalize(self.left(left)), F.normalize(self.right(right))
        return *features, self.log_scale.exp()


def gradient(model: nn.Module) -> Tensor:
    """All parameters' gradients, end to end."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def main(rank: int, processes: int) -> None:
    """One step on this process's part, and the whole batch's for comparison."""
    torch.manual_seed(0)
    model = TwoEncoders()
    everything = torch.randn(BATCH * processes, WIDTH), torch.randn(BATCH * processes, WIDTH)

    clip_loss(*model(*everything)).backward()
    whole = gradient(model)
    model.zero_grad()

    shared = DistributedDataParallel(model)
    own = (half[rank * BATCH : (rank + 1) * BATCH] for half in everything)
    loss = clip_loss(*shared(*own), dist="gather")
    loss.backward()
    difference = (gradient(model) - whole).norm() / whole.norm()
    print(f"process {rank}: loss {loss.item():.5f}, gradient differs by {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.get_rank(), dist.get_world_size())
    # nobody leaves while another is still in its last exchange
    dist.barrier()
    dist.destroy_process_group()
