"""Texts to tokens, and how many of the texts were too long."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]

# The longest of open_clip's tokens stands for 28 bytes; the rest keeps a cut from reaching back.
BYTES_A_TOKEN = 32
LEAST_BYTES = 77 * BYTES_A_TOKEN
# Words whose tokens are remembered; of new ones the web has no end.
MAX_WORDS = 1 << 16


@dataclass(frozen=True)
class _Cleaned:
    """A text cleaned as before, and cut where no token of it is in the context any more."""

    clean: Callable[[str], str]
    limit: int

    def __call__(self, text: str) -> str:
        # what a text has too much may be what is cleaned away
        cleaned = self.clean(text)
        if len(cleaned) * 4 <= self.limit:
            return cleaned
        return cleaned.encode("utf-8", "surrogatepass")[: self.limit].decode("utf-8", "ignore")


def bounded(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, of a time that is linear in the text, and of bounded memory.

    open_clip's `SimpleTokenizer` takes time with the square of a word's length: minutes for 64 KiB
    of letters without a space. A copy of it sees as much of a text as can be in its context. It
    also remembers every word for ever; where these are too many, it begins anew. Other tokenizers
    are returned as they are.
    """
    source: Any = tokenizer
    if not (hasattr(source, "clean_fn") and hasattr(source, "bpe")):
        return tokenizer
    if len(getattr(source, "cache", ())) > MAX_WORDS:
        # the special tokens are in it from the beginning, and stand for themselves
        special = [source.decoder[number] for number in source.all_special_ids]
        source.cache = dict(zip(special, special, strict=True))
    limit = max(LEAST_BYTES, BYTES_A_TOKEN * (source.context_length or 0))
    bounding = copy.copy(source)
    bounding.clean_fn = _Cleaned(source.clean_fn, limit)
    return bounding


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, int]:
    """The texts' tokens, and how many of the texts lost some to the tokenizer's context length.

    Known of tokenizers that count for themselves (a running number `truncated`) and of
    open_clip's `SimpleTokenizer`; of others 0.

    Args:
        tokenizer: makes (n, L) int64 of n texts.
    """
    # what is asked for differs from one to the other
    source: Any = bounded(tokenizer)
    before = getattr(source, "truncated", None)
    tokens: Tensor = source(texts)
    if before is not None:
        return tokens, source.truncated - before
    end = getattr(source, "eot_token_id", None)
    if end is None:
        return tokens, 0
    # only a row that ends with this token is full, and may have been cut: few are encoded twice
    full = [text for text, last in zip(texts, tokens[:, -1].tolist(), strict=True) if last == end]
    return tokens, sum(len(source.encode(text)) + 2 > tokens.shape[1] for text in full)
