"""What a CUDA graph needs: no loss reads a tensor on the host, and its operators repeat.

Without a GPU this is held by tensors that refuse to be read, custom operators included.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.ops import checks, dense, kept
from fastclip.ops.backend import unavailable_reason
from tests.ops.cases import LOSSES

READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "is_nonzero",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
)


KERNELS = (
    "dense",
    "dense_gradient",
    "finish",
    "flagged",
    "flags",
    "lean",
    "merge",
    "sigmoid",
    "similarity",
    "weigh",
)


class _Read(Exception):
    pass


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as on a device that nobody waits for."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise _Read

    for name in READS:
        monkeypatch.setattr(Tensor, name, refuse)
    # a number on the CPU may be read, and is, to be checked
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    # nothing is kept by `torch` on a GPU: on a CPU the sums of what is kept are read
    monkeypatch.setitem(kept.KEEP_BYTES, "cpu", 0)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_read_on_the_host(name: str, backend: str, reduction: str) -> None:
    case = LOSSES[name].make(24, 8, 9.0, 0.3, seed=1).cast(torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    metrics: dict[str, Tensor] = {}
    options: dict[str, Any] = {"backend": backend, "reduction": reduction}
    if name not in ("siglip", "sup_con"):
        options["metrics"] = metrics
    loss = LOSSES[name].run(leaves, case.static, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert len(gradients) == len(leaves)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("keep_bytes", [0, 1 << 24])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_kernels_decide_on_the_device(
    name: str, reduction: str, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they would write; the interpreter itself reads, so that none is run."""
    reason = unavailable_reason("similarity", "triton", torch.device("cpu"), torch.float32)
    if reason:
        pytest.skip(reason)
    for kernels in KERNELS:
        module = importlib.import_module(f"fastclip.kernels.{kernels}")
        monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)
    case = LOSSES[name].make(24, 8, 9.0, 0.3, seed=1).cast(torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    options: dict[str, Any] = {"backend": "triton", "reduction": reduction}
    if name != "siglip":
        options["keep_bytes"] = keep_bytes
    loss = LOSSES[name].run(leaves, case.static, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert len(gradients) == len(leaves)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_small_batches_read_nothing(
    name: str, implementation: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S whole in memory, as on a GPU."""
    reason = unavailable_reason("similarity", "triton", torch.device("cpu"), torch.float32)
    if implementation == "triton" and reason:
        pytest.skip(reason)
    launched = []
    for kernels in ("dense", "dense_gradient") if not reason else ():
        module = importlib.import_module(f"fastclip.kernels.{kernels}")
        monkeypatch.setattr(module, "launch", lambda kernel, *rest, **more: launched.append(kernel))
    monkeypatch.setattr(dense, "implementation", lambda device, dtype: implementation)
    case = LOSSES[name].make(24, 8, 9.0, 0.3, seed=1).cast(torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    options: dict[str, Any] = {"reduction": reduction}
    if name not in ("siglip", "sup_con"):
        options["metrics"] = {}
    loss = LOSSES[name].run(leaves, case.static, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert len(gradients) == len(leaves)
    assert bool(len(launched)) == (implementation == "triton")


def test_a_read_is_seen(unreadable: None) -> None:
    for read in (lambda t: t.item(), bool, float, lambda t: [0, 1][t.long()], Tensor.cpu):
        with pytest.raises(_Read):
            read(torch.tensor(1.0))
