"""Launches of one forward and backward, as a GPU would get them, beside the eager baselines'.

Without a GPU they are counted on the host: our kernels where they are launched, torch's operations
in a dispatch mode, each as one, which is the least that it launches. Kernels are not run: nothing
on the host depends on what they write.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.bench.losses import OPERATORS
from fastclip.functional import clip_loss
from fastclip.kernels.launch import INTERPRETED
from fastclip.ops import checks, dense, dense_sweeps
from tests.ops.test_capture import KERNELS

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU is there: fastclip.bench counts launches on it"
)

ROWS, WIDTH = 1024, 64
# operations that only describe, allocate or, on a GPU, are the host's
FREE = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
FREE |= {"promote_types", "scalar_tensor", "lift_fresh", "_local_scalar_dense", "_unsafe_view"}
FREE |= {"set_", "resize_", "is_same_size", "sym_size", "_has_compatible_shallow_copy_type"}


class Launches(TorchDispatchMode):
    """Counts what is launched inside; custom operators are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastclip":
            # its own function: calling the operator again would lead here again
            definition = _maybe_get_opdef(func)
            assert definition is not None
            with self, torch.no_grad():
                return definition._init_fn(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name not in FREE and not func.is_view:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Runs a loss forward and backward as on a GPU, and returns what was launched."""
    launched: Counter[str] = Counter()

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched[kernel.fn.__name__] += 1

    def product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        # one of cuBLAS's, whatever the operands' dtype; on a CPU they would be widened first
        launched["mm"] += 1
        return out

    for name in KERNELS:
        monkeypatch.setattr(importlib.import_module(f"fastclip.kernels.{name}"), "launch", launch)
    monkeypatch.setattr(dense_sweeps, "product", product)
    # a tensor on a GPU is not read
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    monkeypatch.setattr(dense, "implementation", lambda device, dtype: "triton")

    def run(loss: Callable[..., Tensor], inputs: list[Tensor], autocast: bool) -> Counter[str]:
        launched.clear()
        leaves = [leaf.detach().requires_grad_() for leaf in inputs]
        with Launches() as launches, monkeypatch.context() as patch:
            # the mode that counts is no reason to be out of the ordinary
            patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(*leaves)
            value.backward()
        return launched + launches.count

    return run


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_fewer_launches_than_the_eager_baseline(
    name: str, autocast: bool, counted: Callable[..., Counter[str]]
) -> None:
    operator = OPERATORS[name]
    inputs = operator.make(ROWS, WIDTH, 14.3)
    ours = counted(operator.ours, inputs, autocast)
    baseline = operator.baselines[0]
    try:
        theirs = counted(baseline.build(inputs), inputs, autocast)
    except ImportError as error:
        pytest.skip(f"{baseline.name}: {error}")
    print(f"{name}: {ours.total()}, {baseline.name}: {theirs.total()}; {dict(ours)}")
    assert ours["lines_kernel"] == ours["gradient_kernel"] == 1
    assert ours.total() < theirs.total()
    if name == "clip":
        assert ours.total() <= 14


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_launches_of_clip(
    dtype: torch.dtype, reduction: str, counted: Callable[..., Counter[str]]
) -> None:
    """Every one of them, by name: what else is launched for nothing."""
    x, y, scale = OPERATORS["clip"].make(ROWS, WIDTH, 14.3)

    def loss(*leaves: Tensor) -> Tensor:
        found = clip_loss(*leaves, reduction=reduction)
        # its gradient is expanded, with a stride of 0
        return found.sum() if reduction == "none" else found

    found = counted(loss, [x.to(dtype), y.to(dtype), scale], False)
    expected = {"lines_kernel": 1, "gradient_kernel": 1, "scalars_kernel": 1, "finish_kernel": 1}
    expected |= {"mm": 3, "ones_like": 1}
    # the means of both directions, and the test's own sum
    expected |= {"total_kernel": 1} if reduction == "sum" else {"mean": 1, "sum": 1}
    if dtype == torch.float16:
        # to the dtype of G
        expected["_to_copy"] = 2
    assert found == expected
