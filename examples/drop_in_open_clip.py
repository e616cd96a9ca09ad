"""An open_clip training loop, as people write it, with one line more.

    python examples/drop_in_open_clip.py [--without]

Trains a small CLIP from open_clip on the embedded scenes and prints the loss of every fifth step
and what computed it. `--without` leaves the one line out: the losses agree to float32's rounding.
"""

import sys

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

import fastclip
from fastclip.data.sources import open_source

BATCH, STEPS = 64, 20


def make_model() -> open_clip.CLIP:
    """An open_clip model, small enough for a laptop."""
    return open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        text_cfg={"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
        output_dict=True,
    )


def read_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, 32, 32) and tokens (B, 24); your own loader goes here."""
    samples = [SCENES.read(0, step * BATCH + i) for i in range(BATCH)]
    preprocess = open_clip.image_transform(32, is_train=False)
    images = torch.stack([preprocess(sample.image) for sample in samples])
    return images, TOKENIZE([sample.texts[0] for sample in samples])


SCENES = open_source("scenes", split="train", count=BATCH * STEPS)
TOKENIZE = open_clip.SimpleTokenizer(context_length=24)

torch.manual_seed(0)
model = make_model()
if "--without" not in sys.argv:
    fastclip.patch_open_clip(model)  # the one line: losses, and this model's attention
loss_function = ClipLoss()  # imported before, and patched all the same
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(STEPS):
    images, tokens = read_batch(step)
    output = model(images, tokens)
    features = F.normalize(output["image_features"]), F.normalize(output["text_features"])
    loss = loss_function(*features, output["logit_scale"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 4:
        patched = hasattr(ClipLoss.forward, "_fastclip_original")
        by = "fastclip" if patched else "open_clip"
        print(f"step {step + 1}: loss {loss.item():.4f}, computed by {by}")
