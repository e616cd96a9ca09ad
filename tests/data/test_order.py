"""The order of samples is a pure function, a permutation, and local."""

from collections import Counter

import pytest

from fastclip.data.order import Order, hash64, permutation


def epoch(order: Order, number: int) -> list[tuple[int, int]]:
    return [order.locate(number, position) for position in range(len(order))]


@pytest.mark.parametrize("window", [0, 1, 7, 64, 10_000])
@pytest.mark.parametrize("counts", [(5,), (10, 0, 3), (0, 1), tuple(range(20))])
def test_every_sample_once_an_epoch(counts: tuple[int, ...], window: int) -> None:
    order = Order(counts, seed=3, window=window)
    everything = [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    for number in (0, 1):
        assert sorted(epoch(order, number)) == everything
    if window == 0:
        assert epoch(order, 0) == everything


def test_seed_and_epoch_change_the_order() -> None:
    counts = (50, 50)
    orders = [epoch(Order(counts, seed), number) for seed in (0, 1) for number in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert epoch(Order(counts, 0), 0) == orders[0]


def test_golden_values() -> None:
    """The order is part of what a checkpoint means: it must never change."""
    # splitmix64's published first output from state 0
    assert hash64(0) == 0xE220A8397B1DCDAF
    assert hash64(1, 2, 3) == 7702586659592502839
    assert permutation(8, 5).tolist() == [3, 4, 2, 5, 0, 7, 1, 6]
    order = Order((4, 3, 5), seed=1, window=6)
    windows = [(2, 2), (2, 3), (2, 4), (2, 0), (1, 0), (2, 1)]
    windows += [(0, 1), (1, 1), (0, 3), (1, 2), (0, 2), (0, 0)]
    assert epoch(order, 2) == windows
    order = Order((4, 3, 5), seed=1, window=6, weights=(1.5, 1, 0.4))
    windows = [(1, 2), (2, 0), (2, 1), (1, 0), (0, 3), (1, 1)]
    assert epoch(order, 2) == [*windows, (0, 2), (0, 0), (0, 0), (0, 3), (0, 1)]


def test_reads_stay_local() -> None:
    """With a window of two shards' length no more than three shards are ever in use."""
    order = Order((100,) * 50, seed=0, window=200)
    places = epoch(order, 0)
    for start in range(0, len(places), 200):
        assert len({shard for shard, _ in places[start : start + 200]}) <= 3
    # and shards are shuffled: the first windows are not the first shards
    assert {shard for shard, _ in places[:200]} != {0, 1}


def test_shuffling_mixes_within_a_window() -> None:
    places = epoch(Order((1000,), seed=0), 0)
    moved = sum(abs(i - place[1]) for i, place in enumerate(places)) / 1000
    # a uniform permutation moves an element by a third of the length on average
    assert 300 < moved < 367


def test_nothing_to_read_is_an_error() -> None:
    for counts in ((), (0, 0), (5, -1)):
        with pytest.raises(ValueError, match="nothing to read"):
            Order(counts, seed=0)
    with pytest.raises(IndexError, match="position 3 is outside an epoch of 3"):
        Order((3,), seed=0).locate(0, 3)


@pytest.mark.parametrize("window", [0, 7, 10_000])
def test_whole_weights_repeat_every_sample(window: int) -> None:
    counts, weights = (5, 0, 3, 4), (1.0, 2.0, 3.0, 2.0)
    order = Order(counts, seed=3, window=window, weights=weights)
    assert len(order) == 5 + 9 + 8
    for number in range(3):
        seen = Counter(epoch(order, number))
        assert seen == {
            (shard, i): weights[shard] for shard in range(4) for i in range(counts[shard])
        }


def test_weights_of_one_change_nothing() -> None:
    counts = (4, 3, 0, 5)
    plain, weighted = (Order(counts, 1, window=6, weights=w) for w in (None, (1.0,) * 4))
    assert epoch(plain, 2) == epoch(weighted, 2)


def test_fractions_are_exact_each_epoch_and_reach_everything() -> None:
    counts, weights = (40, 30, 1), (2.25, 0.5, 0.1)
    order = Order(counts, seed=0, window=16, weights=weights)
    assert len(order) == 90 + 15 + 1
    total: Counter[tuple[int, int]] = Counter()
    for number in range(40):
        seen = Counter(epoch(order, number))
        assert [sum(n for (s, _), n in seen.items() if s == shard) for shard in range(3)] == [
            90,
            15,
            1,
        ]
        # every sample twice, and ten in a row, around the end, once more
        extra = [i for i in range(40) if seen[0, i] == 3]
        assert len(extra) == 10 and all(seen[0, i] in (2, 3) for i in range(40))
        assert sum((i + 1) % 40 not in extra for i in extra) == 1
        total += seen
    assert all(total[1, i] > 0 for i in range(30))
    # a stretch of half the shard holds each sample in half of the epochs: five deviations
    assert all(abs(total[1, i] - 20) < 5 * 10**0.5 for i in range(30))


def test_weighted_reads_stay_local() -> None:
    order = Order((100,) * 50, seed=0, window=200, weights=(2.5,) * 50)
    places = epoch(order, 0)
    assert len(places) == 12_500
    for start in range(0, len(places), 200):
        # passes are of 100 or 50 samples: at most five begin or end within a window
        assert len({shard for shard, _ in places[start : start + 200]}) <= 5


@pytest.mark.parametrize(
    "weight, length", [(0.34, 3), (0.36, 4), (2.96, 30), (0.04, 1), (1.04, 11)]
)
def test_a_stretch_is_rounded_and_not_empty(weight: float, length: int) -> None:
    assert len(Order((10,), 0, weights=(weight,))) == length


def test_impossible_weights() -> None:
    with pytest.raises(ValueError, match="1 weights for 2 shards"):
        Order((3, 3), 0, weights=(1.0,))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="give positive numbers"):
            Order((3, 3), 0, weights=(1.0, weight))
