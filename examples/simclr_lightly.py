"""SimCLR as one writes it with lightly, and SupCon on the same features.

    python examples/simclr_lightly.py

`NTXentLoss` takes the place of `lightly.loss.NTXentLoss`: same arguments, same call, same value.
Shows SimCLR learning on two augmented views of synthetic classes; then SupCon, with the labels.
"""

import torch
from torch import Tensor, nn

from fastclip import NTXentLoss, SupConLoss  # was: from lightly.loss import NTXentLoss

CLASSES, BATCH, STEPS = 10, 256, 30


def two_views(centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two noisy views (B, 32) of samples of the classes, and their labels (B,)."""
    labels = torch.randint(CLASSES, (BATCH,))
    samples = centers[labels] + 0.5 * torch.randn(BATCH, 32)
    first, second = (samples + 0.2 * torch.randn(BATCH, 32) for _ in range(2))
    return first, second, labels


def train(supervised: bool) -> list[float]:
    """The losses of a short training."""
    torch.manual_seed(0)
    centers = torch.randn(CLASSES, 32)
    encoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    nt_xent, sup_con = NTXentLoss(temperature=0.1), SupConLoss(temperature=0.1)
    losses = []
    for _ in range(STEPS):
        first, second, labels = two_views(centers)
        z0, z1 = encoder(first), encoder(second)
        if supervised:
            # (N, V, D) normalized: V views of each sample
            loss = sup_con(nn.functional.normalize(torch.stack((z0, z1), dim=1), dim=-1), labels)
        else:
            # normalizes inside, as lightly's
            loss = nt_xent(z0, z1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


for name, supervised in (("NT-Xent", False), ("SupCon", True)):
    losses = train(supervised)
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
