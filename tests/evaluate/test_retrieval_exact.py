"""Scores do not depend on what stands beside them, so that equal features tie."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.evaluate.retrieval import scores_of


def random_rows(count: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


@pytest.mark.parametrize("width", [3, 64, 512])
def test_a_score_has_the_same_bits_whatever_stands_beside_it(width: int) -> None:
    queries, keys = random_rows(300, width, 0), random_rows(2500, width, 1)
    # the same features at both ends, in the middle of tiles, and across their edges
    keys[[0, 17, 2047, 2048, 2499]] = keys[5].clone()
    queries[[0, 255, 256, 299]] = queries[9].clone()
    scores = scores_of(queries, keys)
    assert torch.equal(scores[9].expand(4, -1), scores[[0, 255, 256, 299]])
    assert torch.equal(scores[:, [5] * 5], scores[:, [0, 17, 2047, 2048, 2499]])
    for row in (0, 100, 299):
        assert torch.equal(scores_of(queries[row : row + 1], keys), scores[row : row + 1])
    assert torch.equal(scores_of(queries, keys[2400:]), scores[:, 2400:])
    exact = queries.double() @ keys.double().T
    # a sum of `width` products below 1 in float32
    assert (scores - exact).abs().max() <= width * 2**-24
