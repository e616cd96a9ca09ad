"""Finding out what went wrong in a step, before it is taken."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite; no parameter was changed."""


def first_non_finite(
    model: nn.Module, inputs: dict[str, Tensor], forward: Callable[[], Any]
) -> str:
    """The name of the first tensor of a step that holds NaN or infinity.

    Looks, in the order of the computation, at the inputs, the parameters, each module's output
    (by running `forward` once more under hooks) and at last the gradients.

    Args:
        inputs: what went into the step, by name.
        forward: repeats the step's forward; its result is not used.
    """
    for name, tensor in inputs.items():
        if _is_bad(tensor):
            return f"input {name!r}"
    for name, parameter in model.named_parameters():
        if _is_bad(parameter):
            return f"parameter {name!r}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output.values() if isinstance(output, dict) else output
            for tensor in tensors if isinstance(output, (tuple, list, dict)) else (output,):
                if isinstance(tensor, Tensor) and _is_bad(tensor):
                    found.append(f"output of {name!r}")

        return hook

    # children before parents, so that the innermost module is the one named
    modules = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _is_bad(parameter.grad):
            return f"gradient of {name!r}"
    return "the loss itself"


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
