"""Fine-tune Hugging Face's CLIPModel without its N x N logits.

    python examples/finetune_transformers.py [MODEL]

MODEL is a folder or a name on the hub; without one a small CLIP with random weights is built here,
so that nothing is downloaded. The loop is what one writes with `return_loss=True`; one line patches
the model: its attention, and a loss that grows with N and not with N squared in memory.
"""

import sys

import torch
from transformers import CLIPConfig, CLIPModel

import fastclip

BATCH, STEPS, VOCABULARY = 32, 6, 128


def make_model() -> CLIPModel:
    """The named model, or a small one of random weights."""
    if sys.argv[1:]:
        return CLIPModel.from_pretrained(sys.argv[1])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    ends = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**tower, **ends, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    return CLIPModel(config)


torch.manual_seed(0)
model = make_model()
side = model.config.vision_config.image_size
# your processor's output goes here; these pairs are noise, to be learned by heart
pixels = torch.randn(BATCH, 3, side, side)
tokens = torch.randint(3, VOCABULARY, (BATCH, 12))
tokens[:, -1] = model.config.text_config.eos_token_id

with torch.no_grad():
    before = model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
handle = fastclip.patch_transformers(model)  # the one line
with torch.no_grad():
    after = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
print(f"loss {before.item():.5f} before the patch, {after.loss.item():.5f} after")
print(f"logits_per_image is {after.logits_per_image}")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(STEPS):
    loss = model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.4f}")
handle.undo()
