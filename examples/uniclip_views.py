"""From shards to MP-NCE: several views of each image, with the parameters that made them.

    python examples/uniclip_views.py [SHARDS]

Loads three views an image and a caption from SHARDS (default: the embedded scenes), gives an image
head the augmentation of each view, and trains UniCLIP's loss over all views and texts together.
"""

import sys
from itertools import chain, count

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from fastclip import MPNCELoss
from fastclip.data.augment import PARAMS, Augmentation
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.sources import open_source
from fastclip.data.training_samples import TrainingSamples
from fastclip.nn.augmentation_encoder import AugmentationEncoder, ResidualHead

SIZE, BATCH, STEPS = 32, 32, 12

torch.manual_seed(0)
source = open_source(sys.argv[1] if sys.argv[1:] else "scenes", split="train", count=512)
views = (Augmentation.weak(SIZE), Augmentation.strong(SIZE), Augmentation.strong(SIZE))
tokenizer = open_clip.SimpleTokenizer(context_length=24)
samples = TrainingSamples(source, Order(source.counts, seed=0), views, tokenizer)
loader = TrainingLoader(samples, BATCH)

image_tower = nn.Sequential(
    *(nn.Conv2d(3, 32, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU())
)
text_tower = nn.EmbeddingBag(tokenizer.vocab_size, 64)
encoder = AugmentationEncoder(PARAMS)
head = ResidualHead(64, encoder.width, 64)
loss_function = MPNCELoss(num_domains=2)
parts = nn.ModuleList([image_tower, text_tower, encoder, head, loss_function])
optimizer = torch.optim.AdamW(parts.parameters(), lr=2e-3)

# one epoch after another
batches = chain.from_iterable(map(loader.batches, count()))
for step, batch in zip(range(STEPS), batches, strict=False):
    blocks = []
    for view, images in enumerate(batch["images"]):
        how = encoder(batch["params"][:, view])
        blocks.append(head(image_tower(images / 255), how))
    blocks.append(text_tower(batch["texts"][0]))
    features = [F.normalize(block, dim=-1) for block in blocks]
    # images are domain 0, texts 1; each pair of domains learns a temperature and an offset
    loss = loss_function(features, domains=[0, 0, 0, 1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss_function.clamp_scale_()
    if step % 4 == 3:
        temperatures = loss_function.log_temperature.exp().tolist()
        print(f"step {step + 1}: loss {loss.item():.3f}, temperatures {temperatures}")
