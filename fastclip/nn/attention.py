"""Self-attention of the layers in which towers keep their weights, by fastclip's operator."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.ops.attention import attention, packed_attention


def self_attention(
    layer: nn.MultiheadAttention, tokens: Tensor, *, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """`layer(tokens, tokens, tokens)` without attention weights, dropout and biases of keys.

    Args:
        layer: with one projection for queries, keys and values.
        tokens: (B, S, D), or (S, B, D) where the layer is not `batch_first`.
        causal: whether a token sees only itself and those before it.
        backend: "auto", "triton", "sdpa" (torch's), "flash" (the flash-attn package) or
            "reference" (dense, twice differentiable).

    Returns:
        The attended tokens, in the layout of `tokens`.

    Examples:
        >>> import torch
        >>> from fastclip.nn.attention import self_attention
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> tokens = torch.randn(2, 50, 64)
        >>> self_attention(layer, tokens).allclose(layer(tokens, tokens, tokens)[0], atol=1e-6)
        True
    """
    packed = F.linear(tokens, layer.in_proj_weight, layer.in_proj_bias)
    qkv = packed.unflatten(-1, (3, layer.num_heads, layer.head_dim))
    if not layer.batch_first:
        qkv = qkv.transpose(0, 1)
    attended = packed_attention(qkv, causal=causal, backend=backend).flatten(2)
    if not layer.batch_first:
        attended = attended.transpose(0, 1)
    return layer.out_proj(attended)


def cross_attention(
    layer: nn.MultiheadAttention, query: Tensor, tokens: Tensor, *, backend: str = "auto"
) -> Tensor:
    """`layer(query, tokens, tokens)` without masks, attention weights and dropout.

    Args:
        layer: `batch_first`.
        query: (B, Q, D).
        tokens: (B, S, D'), of the width that the layer's keys and values have.
        backend: "auto", "triton", "sdpa" (torch's), "flash" (the flash-attn package) or
            "reference" (dense, twice differentiable).

    Returns:
        (B, Q, D).

    Examples:
        >>> import torch
        >>> from fastclip.nn.attention import cross_attention
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True)
        >>> query, tokens = torch.randn(2, 1, 64), torch.randn(2, 50, 32)
        >>> expected = layer(query, tokens, tokens)[0]
        >>> cross_attention(layer, query, tokens).allclose(expected, atol=1e-6)
        True
    """
    if layer.in_proj_weight is None:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    else:
        weights = list(layer.in_proj_weight.chunk(3))
    biases = [None] * 3 if layer.in_proj_bias is None else list(layer.in_proj_bias.chunk(3))
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        for x, weight, bias in zip((query, tokens, tokens), weights, biases, strict=True)
    )
    attended = attention(q, k, v, backend=backend)
    return layer.out_proj(attended.transpose(1, 2).flatten(2))
