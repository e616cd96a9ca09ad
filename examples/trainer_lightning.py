"""Lightning: a module whose training step has the loss over all processes.

    torchrun --nproc_per_node 2 examples/trainer_lightning.py

The "ddp" strategy averages gradients, so `dist="gather"` gives the full batch's. The script
compares the weights after a step of SGD with those of one process that has the whole batch.
"""

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastclip.functional import clip_loss

BATCH, WIDTH, PROCESSES = 32, 16, 2


class TwoEncoders(lightning.LightningModule):
    """Stands for yours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def loss(self, pair: list[Tensor], **options: str) -> Tensor:
        left, right = F.normalize(self.left(pair[0])), F.normalize(self.right(pair[1]))
        return clip_loss(left, right, self.log_scale.exp(), **options)

    def training_step(self, pair: list[Tensor], index: int) -> Tensor:
        return self.loss(pair, dist="gather")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    torch.manual_seed(1)
    everything = [torch.randn(BATCH * PROCESSES, WIDTH) for _ in range(2)]
    model, alone = TwoEncoders(), TwoEncoders()
    alone.loss(everything).backward()
    alone.configure_optimizers().step()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=PROCESSES, strategy="ddp", max_epochs=1, **quiet
    )
    trainer.fit(model, DataLoader(TensorDataset(*everything), batch_size=BATCH))
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs) / 0.1
    print(f"process {trainer.global_rank}: gradient differs by {difference:.1e}")
    assert difference < 1e-5
