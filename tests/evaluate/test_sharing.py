"""Two ranks against one process: the same bits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.cli import main
from fastclip.evaluate import sharing
from fastclip.models.clip import create
from tests.processes import finish, start_ranks
from tests.train.conftest import tiny_model

__all__ = ["tiny_model"]  # fixtures


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each rank has: more could add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.dist
@pytest.mark.parametrize("command", ["zeroshot", "retrieval"])
def test_two_ranks_equal_one_process(
    command: str,
    tiny_model: str,
    tmp_path: Path,
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of seven batches the first rank has four; the first alone prints and writes."""
    weights = tmp_path / "weights.pt"
    torch.save(create(tiny_model).model.state_dict(), weights)
    flags = ["eval", command, "--model", tiny_model, "--pretrained", str(weights)]
    flags += "--device cpu --num-samples 50 --batch-size 8 --workers 0 --output".split()
    assert main([*flags, f"{tmp_path}/alone.json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert "acc1" in alone if command == "zeroshot" else alone["images"] == 50

    ranks = start_ranks(2, main, [*flags, f"{tmp_path}/pair.json"])
    errors = finish(ranks)
    # one object: a second one would be refused
    assert json.loads("".join(rank.output() for rank in ranks)) == alone
    assert errors.count("written to") == 1
    assert (tmp_path / "pair.json").read_text() == (tmp_path / "alone.json").read_text()


@pytest.mark.parametrize(("items", "size"), [(7, 3), (6, 3), (2, 3), (0, 2), (5, 1)])
def test_what_is_dealt_comes_back_in_order(
    items: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the process group in which each rank is asked in turn."""
    dist = sharing.dist
    rank = 0

    def everyone(shares: list[Any], share: list[int]) -> None:
        shares[:] = [[10 * item for item in range(r, items, size)] for r in range(size)]
        assert share == shares[rank]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "all_gather_object", everyone)
    # alone, as in a validation on the first rank of a training
    assert list(sharing.deal(range(items))) == list(range(items))
    for rank in range(size):
        with sharing.together():
            dealt = sharing.deal(range(items))
            assert len(dealt) in (items // size, items // size + 1)
            assert sharing.is_first() == (rank == 0)
            assert sharing.collect([10 * item for item in dealt]) == list(range(0, 10 * items, 10))
