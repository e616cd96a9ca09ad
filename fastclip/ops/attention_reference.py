"""Attention in plain torch: the dense oracle, and torch's own fused operator.

Shape suffixes: B batch, H heads, S and T lines of queries and of keys, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """softmax(scale Q K^T) V with the scores in memory; any dtype, differentiable twice."""
    wide = accumulator_dtype(query.dtype)
    q_BHSD, k_BHTD, v_BHTD = (t.to(wide) for t in (query, key, value))
    scores_BHST = scale * (q_BHSD @ k_BHTD.mT)
    seen = visible(query, key, key_lengths, causal)
    if seen is not None:
        # not -inf: a row of those would have a gradient of NaN
        scores_BHST = scores_BHST.masked_fill(~seen, torch.finfo(wide).min)
    weights_BHST = torch.softmax(scores_BHST, dim=-1)
    if seen is not None:
        weights_BHST = weights_BHST.masked_fill(~seen, 0.0)
    return (weights_BHST @ v_BHTD).to(query.dtype)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """torch's scaled_dot_product_attention, which picks a kernel of its own."""
    if key_lengths is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    # its kernels disagree about a row of masked keys: such a row sees the first, for nothing
    some = key_lengths.clamp(min=1)
    mask = visible(query, key, some, causal)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.masked_fill((key_lengths < 1)[:, None, None, None], 0.0)


def visible(query: Tensor, key: Tensor, key_lengths: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys a query sees, broadcast to (B, 1, S, T); None where it is all of them."""
    columns = torch.arange(key.shape[2], device=key.device)
    seen = None
    if causal:
        seen = (columns <= torch.arange(query.shape[2], device=key.device)[:, None])[None, None]
    if key_lengths is not None:
        within = columns < key_lengths[:, None, None, None]
        seen = within if seen is None else seen & within
    return seen
