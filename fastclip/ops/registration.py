"""How an operator becomes a custom operator of torch: counted, traced, differentiable once.

An operator is a forward, a backward, the shapes of its outputs and a FLOP formula. Tensors are
positional; everything else is one plain record (a NamedTuple), whose fields travel by keyword.
A second derivative is refused.

Two kinds: a backward that is an operator of its own (`Backward`), and gradients that are formed
in the forward (`gradients`), which the backward only multiplies. Those wait in the accumulator's
dtype; the upstream gradient (float16's loss scale among them) is multiplied on before the cast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops.gemm import accumulator_dtype

Tensors = Sequence[Any]
_TYPES = {
    torch.dtype: "ScalarType",
    str: "str",
    bool: "bool",
    float: "float",
    int: "SymInt",
    tuple[int, ...]: "SymInt[]",
    tuple[bool, ...]: "bool[]",
}


@dataclass(frozen=True)
class Backward:
    """The backward of an operator.

    function: (inputs, saved, upstream, options) -> a gradient, or None, for each of the first
        inputs; it gets None for an output that nobody used.
    inputs: how many inputs, from the first on, may have a gradient.
    saved: which outputs it reads.
    constant: which outputs have no gradient.
    flop: (shapes of the inputs, options) -> FLOP.
    fake: (inputs, options) -> gradients of the right shapes, where their memory is laid out
        otherwise than `new_empty` does.
    """

    function: Callable[[Tensors, Tensors, Tensors, Any], Sequence[Tensor | None]]
    inputs: int
    saved: tuple[int, ...]
    constant: tuple[int, ...]
    flop: Callable[[Sequence[Any], Any], int]
    fake: Callable[[Tensors, Any], Tensors] | None = None


def register(
    name: str,
    forward: Callable[..., Any],
    *,
    inputs: str,
    outputs: int,
    record: Any,
    fake: Callable[[Tensors, Any], Tensors],
    flop: Callable[[Sequence[Any], Any], int],
    backward: Backward | None = None,
    gradients: int = 0,
) -> Callable[..., Any]:
    """The custom operator `fastclip::name`, called as `forward`.

    Args:
        name: of the operator.
        forward: takes the inputs and the record's fields by keyword; returns the outputs.
        inputs: the tensors' names, with a question mark where None may stand for one.
        outputs: how many tensors it returns, gradients included.
        record: the NamedTuple of the options.
        fake: (inputs, options) -> tensors of the outputs' shapes, without gradients.
        flop: (shapes of the inputs, options) -> FLOP.
        backward: see `Backward`.
        gradients: the last so many outputs are the gradients of the first so many inputs, empty
            where `options.needs` is False.
    """
    operator = _custom_operator(name, forward, inputs, outputs, record)

    def fake_outputs(*tensors: Any, **options: Any) -> Any:
        chosen = record(**options)
        found = list(fake(tensors, chosen))
        if gradients:
            dtype = accumulator_dtype(chosen.dtype)
            for tensor, need in zip(tensors[:gradients], chosen.needs, strict=True):
                shape = (0,) if not need else tensor.shape if tensor.ndim == 2 else ()
                found.append(tensors[0].new_empty(shape, dtype=dtype))
        return tuple(found) if outputs > 1 else found[0]

    operator.register_fake(fake_outputs)
    _register_flop(name, record, flop)
    if gradients:
        _multiply_in_backward(operator, gradients)
    elif backward is not None:
        _register_backward(name, operator, inputs, record, backward, outputs)
    return operator


def _custom_operator(
    name: str, function: Callable[..., Any], inputs: str, outputs: int, record: Any
) -> CustomOpDef:
    tensors = [f"Tensor{'?' * n.endswith('?')} {n.rstrip('?')}" for n in inputs.split()]
    options = [f"{_TYPES[kind]} {field}" for field, kind in get_type_hints(record).items()]
    result = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    schema = f"({', '.join(tensors)}, *, {', '.join(options)}) -> {result}"
    return torch.library.custom_op(f"fastclip::{name}", mutates_args=(), schema=schema)(function)


def _register_flop(name: str, record: Any, flop: Callable[[Sequence[Any], Any], int]) -> None:
    def formula(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
        return flop(shapes, record(**options))

    register_flop_formula(getattr(torch.ops.fastclip, name))(formula)


def _register_backward(
    name: str, operator: CustomOpDef, inputs: str, record: Any, backward: Backward, outputs: int
) -> None:
    count, names = backward.inputs, inputs.split()
    used = [index for index in range(outputs) if index not in backward.constant]
    saved = [f"saved{index}" for index in backward.saved]
    upstream = [f"d{index}?" for index in used]
    ends = len(names), len(names) + len(saved)

    def run(*tensors: Any, **options: Any) -> Any:
        given = tensors[: ends[0]]
        found = backward.function(
            given, tensors[ends[0] : ends[1]], tensors[ends[1] :], record(**options)
        )
        done = tuple(
            given[0].new_empty(0) if g is None else g.to(t.dtype).reshape(t.shape)
            for g, t in zip(found, given, strict=False)
        )
        return done if count > 1 else done[0]

    def fake(*tensors: Any, **options: Any) -> Any:
        if backward.fake is not None:
            found = backward.fake(tensors[: ends[0]], record(**options))
        else:
            found = [
                tensor.new_empty(tensor.shape) if need else tensors[0].new_empty(0)
                for tensor, need in zip(tensors[:count], options["needs"], strict=True)
            ]
        return tuple(found) if count > 1 else found[0]

    all_inputs = " ".join((*names, *saved, *upstream))
    gradient = _custom_operator(f"{name}_backward", run, all_inputs, count, record)
    gradient.register_fake(fake)
    gradient.register_autograd(no_double_backward)
    _register_flop(f"{name}_backward", record, backward.flop)

    def keep(ctx: Any, inputs: Tensors, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        found = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(found[index] for index in backward.constant))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *(found[index] for index in backward.saved))
        ctx.options = keyword_only_inputs

    def formula(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [upstream[index] for index in used]
        needs = ctx.needs_input_grad[:count]
        if all(one is None for one in given):
            return (None,) * len(names)
        options = {**ctx.options, "needs": list(needs)}
        found = gradient(*ctx.saved_tensors, *given, **options)
        found = (found,) if count == 1 else found
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return *wanted, *(None,) * (len(names) - count)

    operator.register_autograd(formula, setup_context=keep)


def no_double_backward(ctx: object, *upstream: Tensor | None) -> None:
    """Registered as the backward of backward operators."""
    raise RuntimeError(
        "fastclip's fused operators are differentiable once; use backend='reference' "
        "for second derivatives"
    )


@torch.library.custom_op("fastclip::apply_upstream", mutates_args=())
def apply_upstream(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    """`gradient` times a 0-d `upstream`, in the dtype and shape of `like`, the input.

    The input takes part so that a graph of this gradient leads back to it, and a second
    derivative is refused instead of missing.
    """
    return torch.mul(gradient, upstream).to(like.dtype).reshape(like.shape)


@apply_upstream.register_fake
def _(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


apply_upstream.register_autograd(no_double_backward)


def _multiply_in_backward(operator: CustomOpDef, count: int) -> None:
    """The operator's last outputs are the gradients of its first inputs; its first is the value."""

    def keep(ctx: Any, inputs: Tensors, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[-count:], *inputs[:count])
        ctx.inputs = len(inputs)

    def formula(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            nothing: tuple[None, ...] = (None,) * ctx.inputs
            return nothing
        gradients, inputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        # a second copy of all gradients would be the operator's peak
        multiply = _overwrite if is_last_use(gradients) else apply_upstream
        found = [
            multiply(gradient, upstream, like) if need and like is not None else None
            for gradient, like, need in zip(gradients, inputs, ctx.needs_input_grad, strict=False)
        ]
        return *found, *(None,) * (ctx.inputs - count)

    operator.register_autograd(formula, setup_context=keep)


def _overwrite(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    """`apply_upstream`, in place."""
    return gradient.mul_(upstream).to(like.dtype).reshape(like.shape)


def is_last_use(saved: Sequence[Tensor]) -> bool:
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
