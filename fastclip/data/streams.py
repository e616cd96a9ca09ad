"""Draws that the embedded worlds share: one stream of numbers for each key of integers."""

from collections.abc import Sequence
from operator import index
from typing import TypeVar

T = TypeVar("T")

MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finalizer of SplitMix64, a bijection of the 64-bit integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class Stream:
    """SplitMix64 (Steele et al., 2014) keyed by integers: one independent stream for each key."""

    def __init__(self, *keys: int) -> None:
        self._state = 0
        for key in keys:
            # index() also takes NumPy's and torch's integers, whose arithmetic would overflow.
            self._state = _mix((self._state * 0xD1342543DE82EF95 + index(key) + 1) & MASK)

    def bits(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & MASK
        return _mix(self._state)

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return (self.bits() * limit) >> 64

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely as the others."""
        return items[self.below(len(items))]


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError where `value` is not one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")


def check_seed(seed: int) -> int:
    """The seed as Python's integer.

    Raises:
        ValueError: it is outside [0, 2**64).
    """
    seed = index(seed)
    if not 0 <= seed <= MASK:
        raise ValueError(f"seed is {seed}; use an integer in [0, 2**64)")
    return seed
