"""Sharding of a model's parameters over the processes by torch's own `fully_shard` (FSDP2)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model's towers, in the order in which they are defined.

    They are the members of every `nn.Sequential` or `nn.ModuleList` whose members are all of one
    class and have modules inside: a transformer's blocks, a ResNet's bottlenecks, the blocks of the
    stages of timm's networks, a language model's layers. Where such members hold further ones, it
    is those: of a stage of blocks, the blocks; and of a mere wrapper, what it wraps.

    Args:
        model: any; the criterion of a system is left out, whose parameters are used outside it.

    Returns:
        No block is inside another. Empty for a model without repetition.

    Examples:
        >>> from fastclip.models.clip import create
        >>> from fastclip.train.shard import blocks_of
        >>> [type(block).__name__ for block in blocks_of(create("ViT-mini-16px").model)][:2]
        ['ResidualAttentionBlock', 'ResidualAttentionBlock']
    """
    found = []
    repeats = _repeats(model)
    for name, child in model.named_children():
        if name == "criterion":
            continue
        inner = blocks_of(child)
        found += inner if inner or not repeats else [_wrapped(child)]
    return found


def _repeats(module: nn.Module) -> bool:
    members = [_wrapped(member) for member in module.children()]
    return (
        isinstance(module, (nn.Sequential, nn.ModuleList))
        and len({type(member) for member in members}) == 1
        and all(next(member.children(), None) is not None for member in members)
    )


def _wrapped(module: nn.Module) -> nn.Module:
    """The module inside one that adds no parameters of its own."""
    members = list(module.children())
    if len(members) == 1 and next(module.parameters(recurse=False), None) is None:
        return _wrapped(members[0])
    return module


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
) -> None:
    """Shard a model in place: each block by itself, what is left together.

    All processes begin with the first one's parameters and buffers. A process holds its rows of
    each float32 parameter; the whole ones of a block are there while it runs forward or backward.
    Parameters without dimensions (a logit scale) are not sharded, and their gradients are left for
    the caller to average.

    Args:
        model: on the mesh's device; becomes an `FSDPModule`.
        mesh: of one dimension.
        dtype: that the parameters and inputs of blocks have while they are computed; None for
            float32. Gradients are reduced in float32. What is outside blocks stays float32 for
            autocast to cast, and so do blocks with batch normalization, whose statistics are.
        compiled: have each block's forward compiled, at its first call.
    """
    if mesh.size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0, group=mesh.get_group())
    for parameter in model.parameters():
        # not contiguous(): a 1x1 convolution in channels_last passes for it, strides and all
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    ignored = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    plain = MixedPrecisionPolicy()
    for block in blocks_of(model):
        policy = plain if any(isinstance(m, _BatchNorm) for m in block.modules()) else low
        if compiled:
            # not the whole module: what gathers and frees parameters hangs on its call, in hooks
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=plain, ignored_params=ignored)


def own_rows(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of each parameter, sharing its memory; whole ones as they are.

    They are leaves that an optimizer, a norm or a loss scale takes as any others: what each does
    with an entry depends on no entry of another process but through the gradient's norm.
    """
    return {
        name: parameter.to_local().detach().requires_grad_(parameter.requires_grad)
        if isinstance(parameter, DTensor)
        else parameter
        for name, parameter in parameters.items()
    }


def as_sharded(rows: Tensor, like: Tensor) -> Tensor:
    """This process's rows as part of a whole that is cut as the parameter `like` is; no copy."""
    if not isinstance(like, DTensor):
        return rows.detach()
    return DTensor.from_local(
        rows.detach(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; all processes must ask for it."""
    own: Any = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own
