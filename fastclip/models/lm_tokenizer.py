"""Texts to tokens by a language model's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Captions of 57 words on average (Stone et al. 2024) seldom have more tokens.
CONTEXT_LENGTH = 128

PADDING = -1


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a language model as text tower needs transformers: "
            "pip install 'fastclip-kernels[recaption]'",
            name=error.name,
        ) from error
    return transformers


class LanguageModelTokenizer:
    """Texts to token numbers, padded with -1; special tokens are those the model is used to.

    Args:
        name: of a model on the Hugging Face Hub, or a folder with a tokenizer in it.
        context_length: L; by default 128, or the most where that is less.
        most: tokens that the model takes; None where it does not say.

    Attributes:
        truncated: how many texts were cut so far; may be set.

    Raises:
        ValueError: the context is out of range.
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(
        self, name: str | Path, context_length: int | None = None, most: int | None = None
    ) -> None:
        load = import_transformers().AutoTokenizer.from_pretrained
        self.tokenizer: Any = load(name, trust_remote_code=False)
        # a huge number where it does not say either
        limit = min(int(self.tokenizer.model_max_length), most or self.tokenizer.model_max_length)
        length = min(CONTEXT_LENGTH, limit) if context_length is None else context_length
        if not 1 <= length <= limit:
            raise ValueError(f"--context-length is {length}; {name} takes 1 to {limit}")
        self.context_length = length
        self.truncated = 0
        sep, eos = self.tokenizer.sep_token_id, self.tokenizer.eos_token_id
        self._end = sep if eos is None else eos

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """(n, L) int64 of n texts, or of one. Longer ones are cut before their end token."""
        texts = [texts] if isinstance(texts, str) else [*texts]
        # JSON may spell half a surrogate pair, which no tokenizer takes
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        rows = torch.full((len(texts), self.context_length), PADDING)
        # the tokenizer would warn of what is cut here
        encoded = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for row, tokens in zip(rows, encoded, strict=True):
            cut = self._cut(tokens)
            row[: len(cut)] = torch.tensor(cut)
        return rows

    def _cut(self, tokens: list[int]) -> list[int]:
        end = [] if self._end is None else [self._end]
        if end and tokens[-1:] != end:
            tokens = tokens + end
        if len(tokens) > self.context_length:
            self.truncated += 1
            tokens = tokens[: self.context_length - len(end)] + end
        # a text without any token has no feature
        return tokens or [0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, from where it can be loaded by that name."""
        self.tokenizer.save_pretrained(folder)
