"""The cache of the frozen layers' states."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastclip.models.state_cache import StateCache
from tests.models.language import draw_tokens, make_tower

WIDTH = 4


class Frozen:
    """States (N, L, WIDTH) that say which token they are of; counts rows."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        return (tokens[..., None] + torch.arange(WIDTH) / 8).requires_grad_().sin()


def text(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


def kept(cache: StateCache, frozen: Frozen, tokens: Tensor) -> bool:
    """Whether they are there; asked of a copy of what is kept, so that nothing changes."""
    probe = StateCache(cache.limit)
    probe._states = dict(cache._states)
    probe.fetch(tokens, frozen)
    return probe.hits == 1


def test_gives_the_same_bits_and_counts() -> None:
    cache, frozen = StateCache(1 << 20), Frozen()
    tokens = draw_tokens(5, 2, 4)
    first = cache.fetch(tokens, frozen)
    real = tokens >= 0
    assert torch.equal(first[real], frozen(tokens)[real].detach())
    assert torch.equal(cache.fetch(tokens, frozen), first)
    assert (cache.misses, cache.hits, frozen.rows) == (3, 3, 6)
    assert cache.bytes == 11 * WIDTH * 4
    assert not first.requires_grad
    assert all(s.untyped_storage().nbytes() == s.nbytes for s in cache._states.values())


def test_computes_only_what_is_missing() -> None:
    cache, frozen = StateCache(1 << 20), Frozen()
    cache.fetch(text(1, 2, 3), frozen)
    # there in another padding, twice the same, and one of which it is a part
    tokens = torch.tensor([[4, -1, -1, -1], [1, 2, 3, -1], [4, -1, -1, -1], [1, 2, 3, 4]])
    found = cache.fetch(tokens, frozen)
    assert (cache.misses, cache.hits, frozen.rows) == (3, 2, 3)
    real = tokens >= 0
    assert torch.equal(found[real], frozen(tokens)[real].detach())


def test_holds_its_limit_and_drops_what_was_used_longest_ago() -> None:
    # room for two texts of 3 tokens
    cache, frozen = StateCache(2 * 3 * WIDTH * 4), Frozen()
    for tokens in (text(1, 1, 1), text(2, 2, 2), text(1, 1, 1), text(3, 3, 3)):
        cache.fetch(tokens, frozen)
        assert cache.bytes <= cache.limit
    assert kept(cache, frozen, text(1, 1, 1)) and kept(cache, frozen, text(3, 3, 3))
    assert not kept(cache, frozen, text(2, 2, 2))
    # a text that never fits leaves the others
    cache.fetch(text(*range(7)), frozen)
    assert cache.bytes == cache.limit
    # a batch larger than the cache is whole all the same
    tokens = torch.arange(12).reshape(4, 3)
    assert torch.equal(cache.fetch(tokens, frozen), frozen(tokens).detach())


def test_without_bytes_it_keeps_nothing() -> None:
    cache, frozen = StateCache(0), Frozen()
    for _ in range(2):
        cache.fetch(text(1, 2), frozen)
    assert (frozen.rows, cache.hits, cache.misses, cache.bytes) == (2, 0, 0, 0)
    with pytest.raises(ValueError, match="-1 bytes"):
        StateCache(-1)


def test_arithmetic_is_part_of_the_key() -> None:
    cache, frozen = StateCache(1 << 20), Frozen()
    cache.fetch(text(1, 2), frozen)
    with torch.autocast("cpu", torch.bfloat16):
        cache.fetch(text(1, 2), frozen)
    assert cache.misses == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_of_a_tower_begins_with_nothing(again: object, tmp_path: Path) -> None:
    tower = make_tower(tmp_path, "gpt2", cache_bytes=1 << 20)
    tokens = draw_tokens(5, 3)
    features = tower(tokens)
    assert tower.cache.bytes > 0
    other = again(tower)
    assert (other.cache.limit, other.cache.bytes) == (1 << 20, 0)
    assert torch.equal(other(tokens), features)
    assert not any("cache" in name for name in tower.state_dict())
    # the copy's layers are its own
    other.language_model.model.h[-1].layer.ln_1.weight.data.zero_()
    assert torch.equal(tower(tokens), features)


def test_other_weights_have_other_states(tmp_path: Path) -> None:
    tower = make_tower(tmp_path, "gpt2", cache_bytes=1 << 20)
    tokens = draw_tokens(5, 3)
    tower(tokens)
    state = {name: value * 1.5 for name, value in tower.state_dict().items()}
    torch.nn.ModuleDict({"text": tower}).load_state_dict({f"text.{n}": v for n, v in state.items()})
    fresh = copy.deepcopy(tower)
    assert torch.equal(tower(tokens), fresh(tokens))
    assert tower.float()(tokens).dtype == torch.float32
