"""Every loss from its definition, apart from the package's code: dense, one value an anchor.

Written in softplus form over negatives, which float64 keeps exact where a softmax saturates; in a
low dtype, or under autocast, they are what a user's own eager code would do.
"""

import torch
from torch import Tensor

Static = dict


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def masked_lse(S: Tensor, negatives: Tensor, dim: int) -> Tensor:
    """log-sum-exp over the negatives; -inf, without gradient, for a line that has none."""
    empty = ~negatives.any(dim)
    lse = S.masked_fill(~negatives & ~empty.unsqueeze(dim), -torch.inf).logsumexp(dim)
    return torch.where(empty, -torch.inf, lse)


def mean_over(kept: Tensor, S: Tensor, dim: int) -> Tensor:
    return torch.where(kept, S, 0.0).sum(dim) / kept.sum(dim)


def clip(x: Tensor, y: Tensor, scale: Tensor, static: Static) -> Tensor:
    n, m = len(x), len(y)
    S = scale * (x @ y.T)
    negatives = ~torch.eye(n, m, dtype=torch.bool)
    if "row_group" in static:
        negatives &= static["row_group"][:, None] != static["column_group"]
    positive = S.diagonal()
    row = softplus(masked_lse(S, negatives, 1) - positive)
    column = softplus(masked_lse(S[:, :n], negatives[:, :n], 0) - positive)
    smoothing = static.get("label_smoothing", 0.0)
    if smoothing:
        left = negatives | torch.eye(n, m, dtype=torch.bool)
        row = row + smoothing * (positive - mean_over(left, S, 1))
        column = column + smoothing * (positive - mean_over(left[:, :n], S[:, :n], 0))
    return (row + column) / 2


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, static: Static) -> Tensor:
    S = scale * (x @ y.T) + bias
    return softplus(S * (1 - 2 * torch.eye(len(x), dtype=S.dtype))).sum(1)


def info_nce(query: Tensor, keys: Tensor, scale: Tensor, static: Static) -> Tensor:
    index = static.get("positive_index", torch.arange(len(query)))
    own = len(keys)
    bank = static.get("bank")
    if bank is not None:
        with torch.autocast("cpu", enabled=False):
            keys = torch.cat([keys, bank.to(keys.dtype)])
    S = scale * (query @ keys.T)
    negatives = torch.arange(len(keys)) != index[:, None]
    if not static.get("in_batch", True):
        negatives[:, :own] = False
    return softplus(masked_lse(S, negatives, 1) - S[torch.arange(len(query)), index])


def mp_nce(*leaves: Tensor, static: Static) -> Tensor:
    *blocks, scale, offset = leaves
    n, count = len(blocks[0]), len(blocks)
    domain = torch.tensor(static["domains"]).repeat_interleave(n)
    pair = torch.arange(n).repeat(count)
    low = torch.minimum(domain[:, None], domain)
    high = torch.maximum(domain[:, None], domain)
    with torch.autocast("cpu", enabled=False):
        z = torch.cat(blocks)
    S = scale[low, high] * (z @ z.T) + offset[low, high]
    same = pair[:, None] == pair
    terms = softplus(masked_lse(S, ~same, 1)[:, None] - S)
    if "pair_weight" in static:
        terms = terms * static["pair_weight"].to(S.dtype)[low, high]
    positives = same & ~torch.eye(len(z), dtype=torch.bool)
    return torch.where(positives, terms, 0.0).sum(1) / (count - 1)


def nt_xent(view1: Tensor, view2: Tensor, temperature: Tensor, static: Static) -> Tensor:
    table = (1 / temperature).reshape(1, 1)
    static = {"domains": [0, 0]}
    return mp_nce(view1, view2, table, torch.zeros_like(table), static=static)


def sup_con(z: Tensor, temperature: Tensor, static: Static) -> Tensor:
    labels = static["labels"]
    S = (z @ z.T) / temperature
    others = ~torch.eye(len(z), dtype=torch.bool)
    positives = (labels[:, None] == labels) & others
    lse = masked_lse(S, others, 1)
    count = positives.sum(1)
    mean = torch.where(positives, S, 0.0).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, lse - mean, 0.0)
