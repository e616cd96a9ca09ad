"""A tiny language model, taught on captions: the pretrained text tower of a study."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.atomic import write_folder

WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 96
BATCH, RATE = 32, 2e-3


def teach(folder: Path, texts: Sequence[str], steps: int, seed: int = 0) -> float:
    """Make a GPT-2 of 4 layers, train it on texts, save it as a folder.

    Its states are centered: their mean over texts is taken off, since all texts would otherwise
    have nearly the same feature.

    Args:
        folder: for the model and its tokenizer.
        texts: to train on, at least 512.
        steps: of training, with 32 texts each.
        seed: of weights and order.

    Returns:
        Its loss over the last tenth of training, nats a token.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

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
    for step in range(steps):
        batch = [f"{text} {tokenizer.eos_token}" for text in drawn.sample(texts, BATCH)]
        tokens, mask = _encoded(tokenizer, batch)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        wanted = tokens.masked_fill(mask == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    _center(model, *_encoded(tokenizer, drawn.sample(texts, 16 * BATCH)))
    write_folder(folder, model.save_pretrained)
    write_folder(folder, tokenizer.save_pretrained)
    tenth = losses[-max(1, steps // 10) :]
    return sum(tenth) / len(tenth)


def _encoded(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    encoded = tokenizer(
        texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"]


@torch.no_grad()
def _center(model: Any, tokens: Tensor, mask: Tensor) -> None:
    """Make the mean of these texts' pooled states zero: the last layer norm's bias takes it off."""
    # as the model is used: with dropout it would be another mean
    model.eval()
    states = model.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    model.transformer.ln_f.bias -= pooled.mean(0)


def _tokenizer(texts: Sequence[str]) -> Any:
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
