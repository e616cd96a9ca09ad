"""torch.func, meta tensors, and arguments that name processes which are not there."""

import pytest
import torch

import fastclip
from tests.ops.cases import LOSSES


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
@pytest.mark.parametrize("name", LOSSES)
def test_torch_func_is_for_the_reference(name: str, transform) -> None:
    case = LOSSES[name].make(6, 3, 4.0, 0.3, seed=1)
    leaf = case.leaves[0].clone().requires_grad_()

    def loss(x: torch.Tensor, backend: str) -> torch.Tensor:
        return LOSSES[name].run([x, *case.leaves[1:]], case.static, backend=backend)

    (want,) = torch.autograd.grad(loss(leaf, "reference"), leaf)
    got = transform(lambda x: loss(x, "reference"))(case.leaves[0])
    torch.testing.assert_close(got, want)
    stack = torch.stack([case.leaves[0]] * 2)
    for fused in (
        lambda: transform(lambda x: loss(x, "torch"))(case.leaves[0]),
        lambda: torch.func.vmap(transform(lambda x: loss(x, "torch")))(stack),
    ):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            fused()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_meta_tensors_give_meta_results(name: str, reduction: str, backend: str) -> None:
    case = LOSSES[name].make(6, 3, 4.0, 0.3, seed=1).cast(torch.float32)
    shape = LOSSES[name].run(case.leaves, case.static, reduction=reduction).shape
    leaves = [leaf.to("meta").requires_grad_() for leaf in case.leaves]
    static = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in case.static.items()}
    loss = LOSSES[name].run(leaves, static, reduction=reduction, backend=backend)
    assert loss.device.type == "meta" and loss.shape == shape
    loss.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("modes", [{}, {"gather_with_grad": True}, {"local_loss": True}])
def test_processes_that_are_not_there(modes: dict) -> None:
    x = torch.nn.functional.normalize(torch.randn(4, 3), dim=-1)
    scale = torch.tensor(3.0, requires_grad=True)
    loss = fastclip.ClipLoss(world_size=2, **modes)
    with pytest.raises(ValueError, match="init_process_group"):
        loss(x, x, scale)


@pytest.mark.parametrize(
    "name", ["ClipLoss", "NTXentLoss", "InfoNCELoss", "SupConLoss", "MPNCELoss"]
)
def test_an_exchange_that_is_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="dist is 'x'; use 'gather', 'ring' or None"):
        getattr(fastclip, name)(dist="x")


def test_forward_mode_by_an_offset_is_refused() -> None:
    """Its tangent would silently be zero."""
    blocks = [torch.nn.functional.normalize(torch.randn(4, 3), dim=-1) for _ in range(2)]

    def loss(offset: torch.Tensor) -> torch.Tensor:
        return fastclip.functional.mp_nce_loss(
            blocks, [0, 1], torch.full((2, 2), 9.0), offset, backend="torch"
        )

    offset = torch.zeros(2, 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(offset, torch.ones(2, 2))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss(dual)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(loss)(offset)
