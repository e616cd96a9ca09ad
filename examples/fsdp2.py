"""FSDP2: parameters in shards, the loss over all processes, the full batch's gradient.

    torchrun --nproc_per_node 2 examples/fsdp2.py

The scale leaves the model's forward with the features: there FSDP2 has it whole; outside it is a
DTensor, which fastclip refuses. On GPUs leave out the mesh and put model and data on one each.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastclip.functional import clip_loss

BATCH, WIDTH = 64, 16


class TwoEncoders(nn.Module):
    """Stands for yours; FSDP2 shards no 0-d parameters, so the scale has one entry."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.log_scale = nn.Parameter(torch.tensor([2.66]))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = F.normalize(self.left(left)), F.normalize(self.right(right))
        return *features, self.log_scale.exp()


def main(rank: int, processes: int) -> None:
    """One step on this process's part, and the whole batch's for comparison."""
    torch.manual_seed(0)
    model = TwoEncoders()
    everything = torch.randn(BATCH * processes, WIDTH), torch.randn(BATCH * processes, WIDTH)
    clip_loss(*model(*everything)).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))
    own = (half[rank * BATCH : (rank + 1) * BATCH] for half in everything)
    loss = clip_loss(*model(*own), dist="gather")
    loss.backward()
    sharded = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    difference = (sharded - whole).norm() / whole.norm()
    print(f"process {rank}: loss {loss.item():.5f}, gradient differs by {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.get_rank(), dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()
