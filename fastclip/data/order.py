"""The order of samples: a pure function of (seed, epoch, position).

Shards are shuffled, their samples laid end to end, and shuffled again inside windows of fixed
length, so that at any moment only a few shards are read. Only the sample counts are needed, so
any process can say what comes at any position, and resuming is three integers.

Randomness is a hash of integers (splitmix64), not a generator's stream: the same on every
machine, library version and number of workers.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFAULT_WINDOW = 32_768

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash64(*values: int) -> int:
    """A well-mixed 64-bit hash of integers; the order of the arguments matters."""
    state = 0
    for value in values:
        state = (state + _GOLDEN + (value & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permutation(length: int, seed: int) -> np.ndarray:
    """A permutation of range(length), int64, that depends on nothing but its arguments."""
    with np.errstate(over="ignore"):
        state = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")


@dataclass(frozen=True)
class Order:
    """Where the sample at each position of each epoch comes from.

    Args:
        counts: samples in each shard, as declared before reading; at least one in all.
        seed: any integer.
        window: samples shuffled together after the shards were; 0 keeps the shards' own order.

    Raises:
        ValueError: there are no samples, or a count or the window is negative.
    """

    counts: tuple[int, ...]
    seed: int
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        if any(count < 0 for count in self.counts) or sum(self.counts) == 0:
            raise ValueError(f"sample counts are {list(self.counts)[:8]}: there is nothing to read")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; give 0 (no shuffling) or more")

    def __len__(self) -> int:
        return sum(self.counts)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, index within it) of the sample at `position` of `epoch`, both from 0."""
        length = len(self)
        if not 0 <= position < length:
            raise IndexError(f"position {position} is outside an epoch of {length} samples")
        shards, starts = _shard_order(self, epoch)
        offset = position
        if self.window:
            window, inside = divmod(position, self.window)
            offset = window * self.window + int(_window_order(self, epoch, window)[inside])
        slot = int(np.searchsorted(starts, offset, side="right")) - 1
        return int(shards[slot]), offset - int(starts[slot])


@lru_cache(maxsize=4)
def _shard_order(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The shards in this epoch's order and the offset at which each begins."""
    count = len(order.counts)
    shards = permutation(count, hash64(order.seed, epoch)) if order.window else np.arange(count)
    # empty shards occupy no offset: leave them out so that searchsorted never lands on one
    shards = shards[np.asarray(order.counts)[shards] > 0]
    lengths = np.asarray(order.counts, dtype=np.int64)[shards]
    return shards, np.cumsum(lengths) - lengths


@lru_cache(maxsize=16)
def _window_order(order: Order, epoch: int, window: int) -> np.ndarray:
    length = min(order.window, len(order) - window * order.window)
    return permutation(length, hash64(order.seed, epoch, window, 1))
