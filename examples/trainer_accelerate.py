"""accelerate: its training loop, with the loss over all processes.

    torchrun --nproc_per_node 2 examples/trainer_accelerate.py

Its wrapper averages gradients as DistributedDataParallel does: `dist="gather"` gives the full
batch's gradient. On GPUs use `accelerate launch`, which on a CPU starts one process alone.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

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


def main() -> None:
    """One step on this process's part, and the whole batch's for comparison."""
    accelerator = Accelerator(cpu=True)
    rank, processes = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = TwoEncoders()
    everything = torch.randn(BATCH * processes, WIDTH), torch.randn(BATCH * processes, WIDTH)
    clip_loss(*model(*everything)).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    shared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    own = (half[rank * BATCH : (rank + 1) * BATCH] for half in everything)
    loss = clip_loss(*shared(*own), dist="gather" if processes > 1 else None)
    accelerator.backward(loss)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    difference = (found - whole).norm() / whole.norm()
    print(f"process {rank}: loss {loss.item():.5f}, gradient differs by {difference:.1e}")
    assert difference < 1e-5
    optimizer.step()


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
