"""Losses with groups, anchors' weights and biases, from the table of docs/mathematics.md.

Dense, one value an anchor, apart from the package's code and in the textbook's form: softmax
cross-entropies whose targets are spread over the positives.
"""

import torch
from torch import Tensor


def cross_entropy(S: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Of each row: logsumexp over the candidates less the mean over the positives."""
    lse = S.masked_fill(~candidates, -torch.inf).logsumexp(1)
    return lse - torch.where(positives, S, 0.0).sum(1) / positives.sum(1)


def smoothed(S: Tensor, positives: Tensor, candidates: Tensor, smoothing: float) -> Tensor:
    """The same, with part of the target on all candidates."""
    own = cross_entropy(S, positives, candidates)
    return (1 - smoothing) * own + smoothing * cross_entropy(S, candidates, candidates)


def one_direction(
    S: Tensor, same: Tensor, role: str, smoothing: float = 0.0, negatives_from: int = 0
) -> Tensor:
    """Rows among columns; row i's own column is column i, `same` says which share its group."""
    own = torch.eye(*S.shape, dtype=torch.bool)
    everyone = torch.arange(S.shape[1]).expand(S.shape) >= negatives_from
    if role == "positive":
        return smoothed(S, same | own, everyone | same | own, smoothing)
    return smoothed(S, own, (everyone & ~same) | own, smoothing)


def clip(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    groups: tuple[Tensor, Tensor],
    role: str,
    smoothing: float = 0.0,
) -> Tensor:
    n, S = len(x), scale * (x @ y.T)
    same = groups[0][:, None] == groups[1]
    rows = one_direction(S, same, role, smoothing)
    columns = one_direction(S[:, :n].T, same[:, :n].T, role, smoothing)
    return (rows + columns) / 2


def info_nce(
    x: Tensor, y: Tensor, scale: Tensor, groups: tuple[Tensor, Tensor], role: str, **others: int
) -> Tensor:
    same = groups[0][:, None] == groups[1]
    return one_direction(scale * (x @ y.T), same, role, **others)


def siglip(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: tuple[Tensor, Tensor],
    role: str,
) -> Tensor:
    S = scale * (x @ y.T) + bias
    own = torch.eye(len(x), dtype=torch.bool)
    same = groups[0][:, None] == groups[1]
    positives = own | same if role == "positive" else own
    terms = torch.where(positives, -S, S).exp().log1p()
    left_out = same & ~own if role == "excluded" else torch.zeros_like(own)
    return terms.masked_fill(left_out, 0.0).sum(1)


def nt_xent(view1: Tensor, view2: Tensor, temperature: Tensor, group: Tensor, role: str) -> Tensor:
    z = torch.cat([view1, view2])
    S, n = z @ z.T / temperature, len(view1)
    sample, group = torch.arange(n).repeat(2), group.repeat(2)
    itself = torch.eye(2 * n, dtype=torch.bool)
    view = (sample[:, None] == sample) & ~itself
    same = group[:, None] == group
    if role == "positive":
        return cross_entropy(S, same & ~itself, ~itself)
    return cross_entropy(S, view, ~same | view)


def mp_nce(
    blocks: list[Tensor],
    domains: list[int],
    scale: Tensor,
    offset: Tensor,
    pair_weight: Tensor,
    group: Tensor,
) -> Tensor:
    """Groups excluded: a softmax for each pair of an anchor and a positive."""
    n, count = len(blocks[0]), len(blocks)
    z, domain = torch.cat(blocks), torch.tensor(domains).repeat_interleave(n)
    low = torch.minimum(domain[:, None], domain)
    high = torch.maximum(domain[:, None], domain)
    S = scale[low, high] * (z @ z.T) + offset[low, high]
    pair, ids = torch.arange(n).repeat(count), group.repeat(count)
    negatives = ids[:, None] != ids
    losses = []
    for i in range(len(z)):
        terms = [
            pair_weight[low[i, p], high[i, p]]
            * (torch.cat([S[i][negatives[i]], S[i, p : p + 1]]).logsumexp(0) - S[i, p])
            for p in range(len(z))
            if pair[p] == pair[i] and p != i
        ]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (weights * losses).sum() / weights.sum()


def biased_clip(
    x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor, column_bias: Tensor, left_out: Tensor
) -> Tensor:
    """Of each pair the rows' and the columns' cross-entropy, with different factors."""
    n, S = len(x), scale * (x @ y.T)
    own = torch.eye(*S.shape, dtype=torch.bool)
    candidates = own | ~left_out
    rows = cross_entropy(S + column_bias, own, candidates)
    columns = cross_entropy((S + row_bias[:, None])[:, :n].T, own[:, :n], candidates[:, :n].T)
    return rows + 3 * columns
