"""What the pages say of SupConLoss beside other libraries' classes of that name."""

import pytest
import torch
import torch.nn.functional as F

from fastclip import SupConLoss


def _supcontrast(z, labels, temperature: float, base_temperature: float = 0.07):
    """SupContrast's value, from its formula."""
    others = 1 - torch.eye(len(z))
    S = z @ z.T / temperature
    log_share = S - (S.exp() * others).sum(1, keepdim=True).log()
    same = (labels[:, None] == labels) * others
    return -(temperature / base_temperature) * ((same * log_share).sum(1) / same.sum(1)).mean()


def _inputs():
    generator = torch.Generator().manual_seed(0)
    views = F.normalize(torch.randn(8, 2, 6, generator=generator), dim=-1)
    return views, torch.arange(8) // 2


def test_supcontrasts_value_is_ours_times_a_factor() -> None:
    views, labels = _inputs()
    rows, ids = views.flatten(0, 1), labels.repeat_interleave(2)
    for temperature in (0.07, 0.1, 0.5):
        ours = SupConLoss(temperature)(views, labels)
        theirs = _supcontrast(rows, ids, temperature)
        torch.testing.assert_close(ours * temperature / 0.07, theirs, rtol=1e-5, atol=1e-6)


def test_pytorch_metric_learnings_value_is_of_normalized_features() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    views, labels = _inputs()
    raw = 3 * views[:, 0]
    theirs = losses.SupConLoss(temperature=0.1)(raw, labels)
    torch.testing.assert_close(SupConLoss(0.1)(views[:, 0], labels), theirs, rtol=1e-5, atol=1e-6)
    assert abs(SupConLoss(0.1)(raw, labels) - theirs) > 1
    assert losses.SupConLoss().temperature == 0.1 and SupConLoss().temperature == 0.07
