"""The order of samples: a pure function of (seed, epoch, position).

Shards are shuffled, their samples laid end to end, and shuffled again inside windows of fixed
length, so that at any moment only a few shards are read. Only the sample counts are needed, so
any process can say what comes at any position, and resuming is three integers.

Randomness is a hash of integers (splitmix64), not a generator's stream: the same on every
machine, library version and number of workers.
"""

import math
from dataclasses import dataclass, field
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
        weights: how many times an epoch passes over each shard; None for once. The whole part w
            of a weight gives w passes over all of the shard, the fractional part f one over a
            stretch of round(f * count) samples (one at least) that begins, anew each epoch, at a
            hash of (seed, epoch, shard) and continues at the shard's beginning where it ends. So
            every epoch has the same length.

    Raises:
        ValueError: there are no samples, a count or the window is negative, or the weights are
            not one positive number a shard.

    Examples:
        >>> from fastclip.data.order import Order
        >>> order = Order(counts=(3, 2), seed=0)
        >>> sorted(order.locate(epoch=0, position=i) for i in range(len(order)))
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        >>> len(Order(counts=(3, 2), seed=0, weights=(1, 2.5)))  # 3 + 2 * 2 + 1
        8
    """

    counts: tuple[int, ...]
    seed: int
    window: int = DEFAULT_WINDOW
    weights: tuple[float, ...] | None = None
    _length: int = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(count < 0 for count in self.counts) or sum(self.counts) == 0:
            raise ValueError(f"sample counts are {list(self.counts)[:8]}: there is nothing to read")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; give 0 (no shuffling) or more")
        if self.weights is not None:
            if len(self.weights) != len(self.counts):
                raise ValueError(f"{len(self.weights)} weights for {len(self.counts)} shards")
            if not all(0 < weight < math.inf for weight in self.weights):
                raise ValueError(f"weights are {list(self.weights)[:8]}; give positive numbers")
        # both are asked for at every sample, and there may be a hundred thousand shards
        object.__setattr__(self, "_length", int(_passes(self)[1].sum()))
        key = (self.counts, self.seed, self.window, self.weights or ())
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash

    def __len__(self) -> int:
        return self._length

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, index within it) of a sample, both from 0.

        Args:
            epoch: from 0 on.
            position: in the epoch, in [0, len).

        Raises:
            IndexError: there is no such position.
        """
        length = len(self)
        if not 0 <= position < length:
            raise IndexError(f"position {position} is outside an epoch of {length} samples")
        shards, starts, firsts = _shard_order(self, epoch)
        offset = position
        if self.window:
            window, inside = divmod(position, self.window)
            offset = window * self.window + int(_window_order(self, epoch, window)[inside])
        slot = int(np.searchsorted(starts, offset, side="right")) - 1
        shard = int(shards[slot])
        index = int(firsts[slot]) + offset - int(starts[slot])
        return shard, index % self.counts[shard]


def _passes(order: Order) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, length, and whether it is part of a shard, of each pass that an epoch consists of."""
    counts = np.asarray(order.counts, dtype=np.int64)
    shards = np.arange(len(counts))
    if order.weights is None:
        return shards, counts, np.zeros(len(counts), dtype=bool)
    whole = np.floor(order.weights)
    fraction = np.asarray(order.weights) - whole
    stretch = np.maximum(np.rint(fraction * counts).astype(np.int64), (fraction > 0) & (counts > 0))
    passes = whole.astype(np.int64) + (stretch > 0)
    ends = np.cumsum(passes)
    shards = np.repeat(shards, passes)
    lengths, partial = counts[shards], np.zeros(len(shards), dtype=bool)
    lengths[ends[stretch > 0] - 1] = stretch[stretch > 0]
    partial[ends[stretch > 0] - 1] = True
    return shards, lengths, partial


@lru_cache(maxsize=4)
def _shard_order(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The passes in this epoch's order: shard, offset at which it begins, index it begins with."""
    shards, lengths, partial = _passes(order)
    count = len(shards)
    turns = permutation(count, hash64(order.seed, epoch)) if order.window else np.arange(count)
    # empty passes occupy no offset: leave them out so that searchsorted never lands on one
    turns = turns[lengths[turns] > 0]
    shards, lengths, partial = shards[turns], lengths[turns], partial[turns]
    firsts = np.zeros(len(shards), dtype=np.int64)
    for turn in np.flatnonzero(partial):
        shard = int(shards[turn])
        firsts[turn] = hash64(order.seed, epoch, shard, 4) % order.counts[shard]
    return shards, np.cumsum(lengths) - lengths, firsts


@lru_cache(maxsize=16)
def _window_order(order: Order, epoch: int, window: int) -> np.ndarray:
    length = min(order.window, len(order) - window * order.window)
    return permutation(length, hash64(order.seed, epoch, window, 1))
