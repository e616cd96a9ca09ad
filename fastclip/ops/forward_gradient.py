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
def apply_upstream(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    """`gradient` times a 0-d `upstream`, in the dtype and shape of `like`, the input.

    The input takes part so that a graph of this gradient leads back to it, and a second
    derivative is refused instead of missing.
    """
    return torch.mul(gradient, upstream).to(like.dtype).reshape(like.shape)


@apply_upstream.register_fake
def _(gradient, upstream, like):
    return like.new_empty(like.shape)


apply_upstream.register_autograd(checks.no_double_backward)


def save_gradients(
    ctx: Any, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor], others: Sequence[Tensor]
) -> None:
    """For setup_context: keep what the forward computed; `others` are outputs without gradient."""
    ctx.mark_non_differentiable(*gradients, *others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, *inputs)


def multiply_saved(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """For the autograd formula: the inputs' gradients."""
    count = len(ctx.saved_tensors) // 2
    if upstream is None:
        return [None] * count
    gradients, inputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    # a second copy of all gradients would be the operator's peak
    multiply = _spend if _for_the_last_time(gradients) else apply_upstream
    return [
        multiply(gradient, upstream, like) if need and like is not None else None
        for gradient, like, need in zip(gradients, inputs, ctx.needs_input_grad, strict=False)
    ]


def _spend(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    """`apply_upstream`, in place."""
    return gradient.mul_(upstream).to(like.dtype).reshape(like.shape)


def _for_the_last_time(saved: Sequence[Tensor]) -> bool:
    """Whether this backward frees its graph, makes no graph of the gradients and is not traced."""
    traced = torch.compiler.is_compiling() or any(type(t) is not Tensor for t in saved)
    if traced or torch.is_grad_enabled():
        return False
    # torch's own compiler asks the same, to reuse what a forward saved
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def wants_gradient(*inputs: Tensor | None) -> list[bool]:
    """Need-flags, to be read outside an operator: inside, grad mode is off."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in inputs]
