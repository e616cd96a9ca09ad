"""Operators that compute their gradient in the forward: the backward only multiplies.

The gradients wait in the accumulator's dtype; the upstream gradient (float16's loss scale among
them) is multiplied on before the cast to the input's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.ops import checks


@torch.library.custom_op("fastclip::apply_upstream", mutates_args=())
def apply_upstream(
    gradient: Tensor, upstream: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """`gradient` times a 0-d `upstream`, cast and reshaped; differentiable once only."""
    return torch.mul(gradient, upstream).to(dtype).reshape(list(shape))


@apply_upstream.register_fake
def _(gradient, upstream, dtype, shape):
    return gradient.new_empty(shape, dtype=dtype)


apply_upstream.register_autograd(checks.no_double_backward)


def save_gradients(
    ctx: Any, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor], others: Sequence[Tensor]
) -> None:
    """For setup_context: keep what the forward computed; `others` are outputs without gradient."""
    ctx.mark_non_differentiable(*gradients, *others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.targets = [None if t is None else (t.dtype, t.shape) for t in inputs]


def multiply_saved(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """For the autograd formula: the inputs' gradients."""
    if upstream is None:
        return [None] * len(ctx.targets)
    needs = ctx.needs_input_grad
    return [
        apply_upstream(gradient, upstream, *target) if need and target is not None else None
        for gradient, target, need in zip(ctx.saved_tensors, ctx.targets, needs, strict=False)
    ]


def wants_gradient(*inputs: Tensor | None) -> list[bool]:
    """Need-flags, to be read outside an operator: inside, grad mode is off."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in inputs]
