"""The head that knows its view's augmentation: what it begins as, and what it can learn."""

import random

import pytest
import torch
import torch.nn.functional as F

from fastclip.data.augment import PARAMS, Augmentation, AugmentationParams, draw_view
from fastclip.nn.augmentation_encoder import AugmentationEncoder, ResidualHead


def drawn(count: int) -> torch.Tensor:
    strong = Augmentation.strong(32)
    return torch.stack(
        [draw_view(strong, 64, 48, random.Random(i)).encode(64, 48) for i in range(count)]
    )


def test_it_begins_as_the_plain_projection() -> None:
    torch.manual_seed(0)
    encoder, head = AugmentationEncoder(PARAMS), ResidualHead(32, 128, 16)
    features = torch.randn(10, 32)
    torch.testing.assert_close(head(features, encoder(drawn(10))), features @ head.project.weight.T)


def test_the_formula_of_a_block() -> None:
    torch.manual_seed(0)
    head = ResidualHead(5, 3, 4, blocks=1, hidden=7).double()
    torch.nn.init.normal_(head.leave[0].weight)
    h, a = torch.randn(2, 5).double(), torch.randn(2, 3).double()
    w1, b1 = head.enter[0].weight, head.enter[0].bias
    inner = (torch.cat([h, a], 1) @ w1.T + b1).clamp_min(0)
    expected = (h + inner @ head.leave[0].weight.T) @ head.project.weight.T
    torch.testing.assert_close(head(h, a), expected)


def test_it_learns_what_depends_on_the_augmentation() -> None:
    """A target that the feature alone does not predict: its sign is that of the flip."""
    torch.manual_seed(0)
    params = drawn(1024)
    flip = params[:, 4]
    assert 0.3 < flip.mean() < 0.7
    features = torch.randn(1024, 4)
    target = features[:, :1] * (2 * flip[:, None] - 1)

    def fitted(given: torch.Tensor) -> float:
        torch.manual_seed(1)
        encoder, head = AugmentationEncoder(PARAMS, (32, 32)), ResidualHead(4, 32, 1, hidden=32)
        parameters = [*encoder.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(150):
            loss = F.mse_loss(head(features, encoder(given)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    neutral = AugmentationParams.identity(64, 48).encode(64, 48).expand(1024, -1)
    given, withheld = fitted(params), fitted(neutral)
    assert given < 0.1 < 0.4 < withheld


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AugmentationEncoder(0), "params is 0"),
        (lambda: AugmentationEncoder(18, ()), "at least 1"),
        (lambda: ResidualHead(4, 0, 4), "condition 0"),
        (lambda: ResidualHead(4, 4, 4, blocks=-1), "blocks -1"),
    ],
)
def test_mistakes(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
