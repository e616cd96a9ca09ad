"""Hidden states of texts on the host, so that what is frozen need not run again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class StateCache:
    """Keeps the states of the texts asked for last, each without padding; copies are empty.

    Args:
        limit: most bytes of states kept; 0 for none.

    Attributes:
        hits, misses: rows that were there, and rows that had to be computed.
        bytes: of the states kept now.

    Raises:
        ValueError: the limit is negative.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"a cache of {limit} bytes; give 0 or more")
        self.limit = limit
        self.hits = self.misses = self.bytes = 0
        # in the order of their last use
        self._states: dict[Any, Tensor] = {}
        if limit:
            # here, and not as a decorator: it loads torch's compiler, which takes seconds
            self._fetch = torch.compiler.disable(self._look_up)

    def __reduce__(self) -> Any:
        return StateCache, (self.limit,)

    def clear(self) -> None:
        """Forget all states, as when the weights that made them change."""
        self._states.clear()
        self.bytes = 0

    @torch.no_grad()
    def fetch(self, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The states of all texts, (N, L, width) on the tokens' device, without a graph.

        Args:
            tokens: (N, L) int64; below 0 at padding, which comes after a text.
            compute: states of some rows of `tokens`; asked once for each text that is not there.
        """
        return self._fetch(tokens, compute) if self.limit else compute(tokens)

    def _look_up(self, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        device = tokens.device.type
        # another precision has other states
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        texts = [row[row >= 0].numpy() for row in tokens.cpu()]
        keys = [(precision, text.tobytes()) for text in texts]
        found = {key: self._states[key] for key in keys if key in self._states}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if missing:
            rows = [*missing.values()]
            computed = compute(tokens[rows]).cpu()
            for key, row, states in zip(missing, rows, computed, strict=True):
                # a copy: a part would keep the whole batch in memory
                found[key] = states[: len(texts[row])].clone()
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        for key, states in found.items():
            self._keep(key, states)
        return pad_sequence([found[key] for key in keys], batch_first=True).to(tokens.device)

    def _keep(self, key: Any, states: Tensor) -> None:
        """Put them last, and drop the first as far as needed."""
        if key in self._states:
            self.bytes -= self._states.pop(key).nbytes
        if states.nbytes > self.limit:
            return
        while self.bytes + states.nbytes > self.limit:
            self.bytes -= self._states.pop(next(iter(self._states))).nbytes
        self._states[key] = states
        self.bytes += states.nbytes
