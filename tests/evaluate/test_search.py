"""`fastclip.evaluate.search` beside an exact sort of correctly rounded products."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastclip.evaluate import search as room
from fastclip.evaluate.search import search


def sorted_exactly(features: np.ndarray, query: np.ndarray, k: int) -> list[tuple[float, int]]:
    """(score, row) of the first k of all finite rows; of equal scores the first row is first."""
    scores = [
        (math.fsum(a * b for a, b in zip(row, query.tolist(), strict=True)), place)
        for place, row in enumerate(features.astype(np.float64).tolist())
        if all(map(math.isfinite, row))
    ]
    return sorted(scores, key=lambda one: -one[0])[:k]


def check(features: np.ndarray, queries: np.ndarray, k: int) -> None:
    scores, rows = search(features, queries, k)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64
    for query, score, row in zip(queries.astype(np.float64), scores, rows, strict=True):
        want = sorted_exactly(features, query, k)
        assert row.tolist() == [place for _, place in want]
        assert score.tolist() == pytest.approx([exact for exact, _ in want], rel=2**-22, abs=1e-12)


@pytest.fixture(params=[np.float16, np.float32, np.float64])
def features(request: pytest.FixtureRequest) -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal((700, 24))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(request.param)


@pytest.mark.parametrize("chunk", [1, 64, 8192])
def test_it_is_an_exact_sort(
    features: np.ndarray, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other chunks the result is the same; fewer rows of a chunk than k are enough."""
    monkeypatch.setattr(room, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(room, "CHUNK_QUERIES", 2)
    queries = np.random.default_rng(1).standard_normal((3, 24))
    for k in (1, 10, 100):
        check(features, queries, k)
    if chunk > 1:
        check(features, queries[:1], 700)


def test_equal_rows_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where their products are rounded, and beyond the border of a chunk."""
    monkeypatch.setattr(room, "CHUNK_ROWS", 37)
    random = np.random.default_rng(0)
    distinct = random.standard_normal((3, 100)).astype(np.float32)
    features = distinct[random.integers(3, size=400)]
    queries = random.standard_normal((5, 100)).astype(np.float32)
    check(features, queries, 250)
    assert search(np.ones((400, 7)), np.ones((1, 7)), 400)[1].tolist() == [list(range(400))]


def test_a_difference_in_the_last_bit_counts() -> None:
    features = np.full((300, 64), 0.125, dtype=np.float32)
    features[250, 5] = np.nextafter(np.float32(0.125), np.float32(1))
    rows = search(features, np.ones((1, 64)), 2)[1]
    assert rows.tolist() == [[250, 0]]


def test_rows_that_are_not_finite_are_never_found(features: np.ndarray) -> None:
    features[[3, 500]] = np.nan
    features[7, 0], features[8, 1] = np.inf, -np.inf
    check(features, features[[0, 1]], 696)
    with pytest.raises(ValueError, match="k is 697, and only 696 of 700 rows are finite"):
        search(features, features[:1], 697)


def test_a_file_and_tensors(features: np.ndarray, tmp_path: Path) -> None:
    """A memory map and tensors of any precision give what an array gives."""
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    want = search(features, features[:2], 5)
    for found in (
        search(mapped, mapped[:2], 5),
        search(torch.from_numpy(features), torch.from_numpy(features)[:2].requires_grad_(), 5),
    ):
        assert all(map(torch.equal, found, want))
    rounded = torch.from_numpy(features).bfloat16()
    assert all(map(torch.equal, search(rounded, rounded, 3), search(rounded.float(), rounded, 3)))


def test_the_file_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more rows at a time, whatever their number."""
    asked = []

    class Counted(np.ndarray):
        def __getitem__(self, key: slice) -> np.ndarray:
            asked.append(key)
            return np.asarray(super().__getitem__(key))

    monkeypatch.setattr(room, "CHUNK_ROWS", 50)
    search(np.ones((170, 3)).view(Counted), np.ones((1, 3)), 60)
    assert asked == [slice(start, start + 50) for start in (0, 50, 100, 150)]


@pytest.mark.parametrize(
    ("features", "queries", "k", "message"),
    [
        (torch.ones(4, 3), torch.ones(1, 2), 1, r"shape \(4, 3\) and queries \(1, 2\)"),
        (torch.ones(4, 3), torch.ones(3), 1, "give .N, D. and .Q, D."),
        (torch.ones(4, 3), torch.ones(0, 3), 1, "at least one query"),
        (torch.ones(0, 3), torch.ones(1, 3), 1, "k is 1; give one from 1 to the number of rows, 0"),
        (torch.ones(4, 3), torch.ones(1, 3), 0, "k is 0; give one from 1"),
        (torch.ones(4, 3), torch.ones(1, 3), 5, "k is 5; .* number of rows, 4"),
        (torch.ones(4, 3), torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]]), 1, "query 1 is not fin"),
        (torch.full((4, 3), torch.nan), torch.ones(1, 3), 1, "only 0 of 4 rows are finite"),
    ],
)
def test_refused(features: torch.Tensor, queries: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(features, queries, k)
