"""Texts to tokens, and how many of the texts were too long."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, int]:
    """The texts' tokens, and how many of the texts lost some to the tokenizer's context length.

    Known of tokenizers that count for themselves (a running number `truncated`) and of open_clip's
    `SimpleTokenizer`; of others 0.

    Args:
        tokenizer: makes (n, L) int64 of n texts.
    """
    # what is asked for differs from one to the other
    source: Any = tokenizer
    before = getattr(source, "truncated", None)
    tokens = tokenizer(texts)
    if before is not None:
        return tokens, source.truncated - before
    end = getattr(source, "eot_token_id", None)
    if end is None:
        return tokens, 0
    # only a row that ends with this token is full, and may have been cut: few are encoded twice
    full = [text for text, last in zip(texts, tokens[:, -1].tolist(), strict=True) if last == end]
    return tokens, sum(len(source.encode(text)) + 2 > tokens.shape[1] for text in full)
