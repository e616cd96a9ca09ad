"""A batch larger than memory holds, with encoders of your own: exact accumulation.

    python examples/large_batch_plain_pytorch.py [MICRO_BATCHES]

Two plain PyTorch encoders learn to match two noisy views of the same vectors. A step compares 4,096
pairs with each other, but activations of 4,096 / MICRO_BATCHES (default 8) are alive at a time. The
gradient is the whole batch's: the script compares it with one plain pass and prints the difference.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.functional import clip_loss
from fastclip.train.accumulate import accumulate

BATCH, WIDTH = 4096, 32
MICRO_BATCHES = int(sys.argv[1]) if sys.argv[1:] else 8


class TwoEncoders(nn.Module):
    """Your model: what it returns by name is what the loss gets."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        left, right = self.left(batch[0]), self.right(batch[1])
        return {
            "left": F.normalize(left, dim=-1),
            "right": F.normalize(right, dim=-1),
            "logit_scale": self.log_scale.exp(),
        }


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """The loss of the whole batch, whatever cut it."""
    return clip_loss(outputs["left"], outputs["right"], outputs["logit_scale"])


torch.manual_seed(0)
model = TwoEncoders()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(5):
    truth = torch.randn(BATCH, WIDTH)
    pair = truth + 0.3 * torch.randn_like(truth), truth + 0.3 * torch.randn_like(truth)
    micro_batches = list(zip(*(half.chunk(MICRO_BATCHES) for half in pair), strict=True))

    optimizer.zero_grad()
    loss = accumulate(model, micro_batches, loss_of)
    accumulated = torch.cat([p.grad.flatten() for p in model.parameters()])

    optimizer.zero_grad()
    loss_of(model(pair)).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    difference = (accumulated - plain).norm() / plain.norm()
    print(f"step {step + 1}: loss {loss.item():.4f}, gradient differs by {difference:.1e}")
    optimizer.step()
