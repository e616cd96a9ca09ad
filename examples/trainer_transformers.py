"""Hugging Face's Trainer: a CLIPModel that sees the negatives of all processes.

    torchrun --nproc_per_node 2 examples/trainer_transformers.py

The model computes its loss; patched with `dist="gather"` that is the global batch's, and the
averaged gradient is exact. The script compares the weights after a step of SGD with one process's.
"""

import tempfile

import torch
import torch.distributed as dist
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments, default_data_collator

import fastclip

BATCH, PROCESSES = 8, 2


def tiny_model() -> CLIPModel:
    """Stands for `CLIPModel.from_pretrained(...)`."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def with_loss(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | bool]:
    """Trainer does not ask a CLIPModel for its loss; the batch does."""
    return {**default_data_collator(rows), "return_loss": True}


if __name__ == "__main__":
    torch.manual_seed(1)
    count = BATCH * PROCESSES
    pixels, texts = torch.randn(count, 3, 32, 32), torch.randint(1, 99, (count, 8))
    rows = [{"pixel_values": p, "input_ids": t} for p, t in zip(pixels, texts, strict=True)]
    before, alone, model = tiny_model(), tiny_model(), tiny_model()
    alone(pixel_values=pixels, input_ids=texts, return_loss=True).loss.backward()
    torch.optim.SGD(alone.parameters(), lr=1.0).step()

    fastclip.patch_transformers(model, dist="gather")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=1, learning_rate=1.0, optim="sgd",
            max_grad_norm=0, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, ddp_find_unused_parameters=False,
        )  # fmt: skip
        Trainer(model, arguments, with_loss, train_dataset=rows).train()
    start, one, all_of_them = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (before, alone, model)
    )
    difference = (all_of_them - one).norm() / (one - start).norm()
    print(f"process {dist.get_rank()}: gradient differs by {difference:.1e}")
    assert difference < 1e-5
    dist.barrier()
    dist.destroy_process_group()
