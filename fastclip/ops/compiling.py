"""What torch.compile needs to know of a function, said without importing torch's compiler."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """Call it when a graph is traced, and keep what it returned.

    As `torch.compiler.assume_constant_result`, which imports the compiler to set this mark: that
    takes nearly as long as importing torch, and small batches never need it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
