"""Dropout in a text tower that can be switched on and off, for strong views (Fini et al. 2023)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn


class TextDropout:
    """Drops entries of the states in front of each layer, while it is active and in training.

    Args:
        towers: an open_clip model with a text tower of open_clip's own, which then has the hooks.
        rate: the share of entries that are dropped, in (0, 1); the others are divided by 1 - rate.

    Raises:
        ValueError: the text tower is another library's.

    Examples:
        >>> import torch
        >>> from fastclip.models.clip import create
        >>> from fastclip.models.text_dropout import TextDropout
        >>> towers = create("ViT-mini-16px").model.train()
        >>> dropout, tokens = TextDropout(towers, 0.5), torch.ones(2, 16, dtype=torch.long)
        >>> with dropout.active():
        ...     dropped = towers.encode_text(tokens)
        >>> torch.equal(dropped, towers.encode_text(tokens))
        False
    """

    def __init__(self, towers: nn.Module, rate: float) -> None:
        # in open_clip's models of OpenAI's layout the text tower is the model itself
        transformer = getattr(getattr(towers, "text", towers), "transformer", None)
        layers: Any = getattr(transformer, "resblocks", None)
        if layers is None:
            raise ValueError(
                "text dropout is for text towers of open_clip's own; this model's is another "
                "library's, leave it out"
            )
        self.rate, self._on = rate, False
        for layer in layers:
            layer.register_forward_pre_hook(self._drop)

    def _drop(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (self._on and layer.training):
            return None
        states, *others = arguments
        return F.dropout(states, self.rate), *others

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, texts are encoded with dropout."""
        self._on = True
        try:
            yield
        finally:
            self._on = False
