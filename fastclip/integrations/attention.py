"""Putting fastclip's attention into the layers of a model, weights untouched.

Known are torch's MultiheadAttention, as open_clip's towers have it, and timm's Attention; not their
subclasses with another `forward`. A call that the operator does not cover (attention weights
wanted, dropout while training, a mask other than the causal one) is left to the layer's own code.
Values of masks are read when a model is patched, not in a call: in a tower whose own mask is the
causal one, any mask of that shape, or of a corner of it, counts as causal.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.integrations.patch import (
    PatchHandle,
    forward_owner,
    original_forward,
    replace_forward,
)
from fastclip.nn.attention import cross_attention, self_attention
from fastclip.ops.attention import attention, packed_attention
from fastclip.ops.backend import check_backend

CAUSAL = "_fastclip_causal_length"
"""Attribute of a layer whose masks of that many rows and columns are the causal one."""


def replace_attention(model: nn.Module, handle: PatchHandle, backend: str = "auto") -> int:
    """Replace the attention of every known layer; returns how many there were.

    Raises:
        ValueError: the implementation is unknown.
    """
    check_backend(backend, "attention")
    for tower in list(model.modules()):
        # a text tower's mask is a buffer beside its layers
        _mark_causal(tower.modules(), getattr(tower, "attn_mask", None), handle)
    replaced = 0
    timm_attention = _timm_attention()
    for module in list(model.modules()):
        owner = forward_owner(module)
        if owner is nn.MultiheadAttention:
            replaced += _replace(module, _multihead, backend, handle)
        elif owner is timm_attention:
            replaced += _replace(module, _timm, backend, handle)
    return replaced


def _replace(module: nn.Module, make: Any, backend: str, handle: PatchHandle) -> bool:
    return replace_forward(module, make(backend), handle, made_by=(make, (backend,)))


def _mark_causal(layers: Iterable[nn.Module], mask: Tensor | None, handle: PatchHandle) -> None:
    """Remember that the mask the layers are called with is the causal one, if it is.

    Looked at once, here: a mask's values are not read in a forward pass.
    """
    if mask is None or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return
    length = mask.shape[0]
    causal = torch.full((length, length), -torch.inf, device=mask.device).triu_(1)
    if not torch.equal(mask.float(), causal):
        return
    for layer in layers:
        if isinstance(layer, nn.MultiheadAttention) and not hasattr(layer, CAUSAL):
            setattr(layer, CAUSAL, length)
            handle.on_undo(partial(delattr, layer, CAUSAL))


def _timm_attention() -> type[nn.Module] | None:
    try:
        from timm.models.vision_transformer import Attention
    except ImportError:
        return None
    return Attention


def _multihead(backend: str) -> Any:
    def forward(
        self: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        covered = (
            not need_weights
            and key_padding_mask is None
            and query.ndim == 3
            and (self.dropout == 0.0 or not self.training)
            and self.bias_k is None
            and self.bias_v is None
            and not self.add_zero_attn
            # torch refuses the hint without a mask
            and not (is_causal and attn_mask is None)
        )
        if covered and query is key and key is value and self.in_proj_weight is not None:
            length = query.shape[1 if self.batch_first else 0]
            if attn_mask is None or _is_causal(self, attn_mask, length):
                causal = attn_mask is not None
                return self_attention(self, query, causal=causal, backend=backend), None
        if covered and key is value and attn_mask is None and self.batch_first:
            return cross_attention(self, query, key, backend=backend), None
        return original_forward(
            self,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    return forward


def _is_causal(layer: nn.Module, mask: Tensor, length: int) -> bool:
    # a corner of a causal mask is one too
    known = getattr(layer, CAUSAL, 0)
    return mask.shape == (length, length) and length <= known


def _timm(backend: str) -> Any:
    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        mask = arguments[0] if arguments else options.get("attn_mask")
        dropped = self.attn_drop.p > 0.0 and self.training
        # other options, and gates or norms on the way out, are of other versions and models
        known = set(options) <= {"attn_mask", "is_causal"} and len(arguments) <= 1
        plain = getattr(self, "gate", None) is None
        if mask is not None or dropped or not known or not plain:
            return original_forward(self, x, *arguments, **options)
        causal = bool(options.get("is_causal", False))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            attended = packed_attention(qkv, causal=causal, backend=backend)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            attended = attention(q, k, v, causal=causal, backend=backend).transpose(1, 2)
        attended = self.norm(attended.flatten(2)) if hasattr(self, "norm") else attended.flatten(2)
        return self.proj_drop(self.proj(attended))

    return forward
