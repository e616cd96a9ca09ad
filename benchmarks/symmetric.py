"""NT-Xent, MP-NCE and SupCon beside their baselines. n is the number of rows of all blocks."""

from typing import Any

import torch
from torch import Tensor

from fastclip.bench.runner import Baseline, Inputs, LossFunction, Operator, clustered
from fastclip.functional import mp_nce_loss, nt_xent_loss, sup_con_loss

VIEWS_AND_TEXT = [0, 0, 0, 1]
PER_CLASS = 4


def _two_views(n: int, width: int, scale: float) -> Inputs:
    return [*clustered(2, n // 2, width), torch.tensor(1 / scale)]


def _lightly(inputs: Inputs) -> LossFunction:
    from lightly.loss import NTXentLoss

    # it takes a number, and normalizes rows that are unit already
    loss = NTXentLoss(inputs[2].item())
    return lambda x, y, temperature: loss(x, y)


def _metric_learning_nt_xent(inputs: Inputs) -> LossFunction:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(inputs[2].item())
    labels = torch.arange(len(inputs[0]), device=inputs[0].device).repeat(2)
    return lambda x, y, temperature: loss(torch.cat([x, y]), labels)


def _views(n: int, width: int, scale: float) -> Inputs:
    blocks = clustered(4, n // 4, width)
    return [*blocks, torch.full((2, 2), scale), torch.zeros(2, 2)]


def _mp_nce(*inputs: Tensor, **options: Any) -> Tensor:
    *blocks, scale, offset = inputs
    return mp_nce_loss(blocks, VIEWS_AND_TEXT, scale, offset, **options)


def _dense_mp_nce(inputs: Inputs) -> LossFunction:
    n, count = len(inputs[0]), len(VIEWS_AND_TEXT)
    device = inputs[0].device
    pair = torch.arange(n, device=device).repeat(count)
    domain = torch.tensor(VIEWS_AND_TEXT, device=device)
    low, high = (f(domain[:, None], domain) for f in (torch.minimum, torch.maximum))
    same = pair[:, None] == pair
    itself = torch.eye(count, dtype=torch.bool, device=device)[:, :, None]

    def loss(*leaves: Tensor) -> Tensor:
        *blocks, scale, offset = leaves
        z = torch.cat(blocks)
        tables = (table[low, high][:, None, :, None] for table in (scale, offset))
        scale_BB, offset_BB = tables
        S = scale_BB * (z @ z.T).view(count, n, count, n) + offset_BB
        negatives = S.view(n * count, n * count).masked_fill(same, -torch.inf)
        lse = negatives.logsumexp(1).view(count, 1, n)
        # (count, count, n): of each item's blocks with each other
        terms = torch.nn.functional.softplus(lse - S.diagonal(dim1=1, dim2=3))
        return terms.masked_fill(itself, 0.0).sum() / ((count - 1) * n * count)

    return loss


def _labeled(n: int, width: int, scale: float) -> Inputs:
    blocks = clustered(PER_CLASS, n // PER_CLASS, width)
    return [torch.stack(blocks, dim=1).flatten(0, 1), torch.tensor(1 / scale)]


def _sup_con(z: Tensor, temperature: Tensor, **options: Any) -> Tensor:
    labels = torch.arange(len(z), device=z.device) // PER_CLASS
    return sup_con_loss(z, labels, temperature, **options)


def _metric_learning_sup_con(inputs: Inputs) -> LossFunction:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(inputs[1].item())
    labels = torch.arange(len(inputs[0]), device=inputs[0].device) // PER_CLASS
    return lambda z, temperature: loss(z, labels)


def _dense_sup_con(inputs: Inputs) -> LossFunction:
    labels = torch.arange(len(inputs[0]), device=inputs[0].device) // PER_CLASS
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~itself

    def loss(z: Tensor, temperature: Tensor) -> Tensor:
        S = (z @ z.T) / temperature
        lse = S.masked_fill(itself, -torch.inf).logsumexp(1)
        return (lse - torch.where(positive, S, 0.0).sum(1) / positive.sum(1)).mean()

    return loss


OPERATORS = (
    Operator(
        "nt_xent",
        _two_views,
        nt_xent_loss,
        (
            Baseline("lightly", _lightly, normalizes=True),
            # it forms positives x negatives: rows cubed
            Baseline("pytorch_metric_learning", _metric_learning_nt_xent, 256, normalizes=True),
        ),
        (2, 1, 0),
    ),
    Operator("mp_nce", _views, _mp_nce, (Baseline("dense", _dense_mp_nce),), (2, 1, 0)),
    Operator(
        "sup_con",
        _labeled,
        _sup_con,
        (
            Baseline("dense", _dense_sup_con),
            Baseline("pytorch_metric_learning", _metric_learning_sup_con, normalizes=True),
        ),
        (2, 1, 0),
    ),
)
