"""A tiny language model, taught on the scenes' captions: the pretrained text tower of a study."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastclip.atomic import write_folder
from fastclip.data.scenes import caption, sample_scene

WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 96
CAPTIONS = 4000
BATCH, STEPS, RATE = 32, 200, 2e-3


def teach(folder: Path, seed: int = 0) -> float:
    """Make a GPT-2 of 4 layers, train it on dense and short captions, save it as a folder.

    Returns:
        Its loss over the last tenth of training, nats a token.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    scenes = [sample_scene(i, split="train") for i in range(CAPTIONS)]
    texts = [caption(s, q, i) for i, s in enumerate(scenes) for q in ("dense", "short")]
    tokenizer = _tokenizer(texts)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    drawn, losses = random.Random(seed), []
    for step in range(STEPS):
        batch = [f"{text} {tokenizer.eos_token}" for text in drawn.sample(texts, BATCH)]
        encoded = tokenizer(
            batch, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        tokens, mask = encoded["input_ids"], encoded["attention_mask"]
        logits = model(input_ids=tokens, attention_mask=mask).logits
        wanted = tokens.masked_fill(mask == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
        losses.append(loss.item())
    write_folder(folder, model.save_pretrained)
    write_folder(folder, tokenizer.save_pretrained)
    tenth = losses[-STEPS // 10 :]
    return sum(tenth) / len(tenth)


def _tokenizer(texts: list[str]) -> Any:
    """Words and punctuation of these texts; it needs no file from elsewhere."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, unknown = "<end>", "<unknown>"
    words = Tokenizer(models.WordLevel(unk_token=unknown))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=[end, unknown]))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, unk_token=unknown, pad_token=end
    )
