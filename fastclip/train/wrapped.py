"""Exact accumulation for a model that data-parallel training has wrapped or sharded."""

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from fastclip.train.accumulate import Batch, accumulate


def accumulate_wrapped(
    wrapped: nn.Module,
    forward: Callable[[Batch], Mapping[str, Tensor]],
    micro_batches: Sequence[Batch],
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    shared: Collection[str] = ("logit_scale", "logit_bias"),
    constant: Callable[[Batch], Mapping[str, Tensor]] = lambda batch: {},
    scale_loss: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`accumulate` under DistributedDataParallel, FSDP2 (`fully_shard`) or DeepSpeed's ZeRO.

    After it, every gradient is where the wrapper puts it in a normal backward pass, averaged over
    the processes, whatever the number of micro-batches.

    - DistributedDataParallel: gradients are reduced with the last micro-batch.
    - FSDP2: gradients are reduced with every micro-batch, so that no process holds whole ones.
      Parameters without dimensions, which `fully_shard` takes as `ignored_params` alone, get this
      process's gradient: average it, or give the logit scale the shape (1,).
    - DeepSpeed: gradients are reduced at the end, in ZeRO-3 with every micro-batch. Its loss scale
      is applied here. Its `gradient_accumulation_steps` must be 1.
    - a plain module: gradients are not reduced.

    All processes must call it with as many micro-batches. Loss and features of all processes are
    one batch if the loss exchanges them, e.g. `ClipLoss(..., world_size=N)` or `dist="gather"` of
    `fastclip.functional`, whose gradients are made for being averaged.

    Args:
        wrapped: what the wrapper made of the model: DistributedDataParallel, the sharded module,
            DeepSpeed's engine; or a plain module.
        forward: a micro-batch's outputs by name, see `accumulate`; it calls `wrapped`, not the
            model inside.
        micro_batches: one or more, of any sizes.
        loss: the 0-d loss of the outputs of this process's whole batch, see `accumulate`.
        shared: names of outputs that belong to no sample, see `accumulate`.
        constant: further outputs that no gradient reaches, see `accumulate`.
        scale_loss: a factor against underflow (`GradScaler.scale`); not for DeepSpeed, which has
            its own.

    Returns:
        The loss of this process's whole batch, 0-d, detached, without any scale.

    Raises:
        ValueError: as `accumulate`; or DeepSpeed's engine counts micro-batches itself, or
            `scale_loss` is given with it.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from fastclip import ClipLoss
        >>> from fastclip.train.wrapped import accumulate_wrapped
        >>> tower, scale = torch.nn.Linear(8, 4), torch.tensor(10.0)
        >>> model = tower  # DistributedDataParallel(tower), fully_shard(tower), or an engine
        >>> def forward(batch):
        ...     images, texts = normalize(model(batch.flatten(0, 1)), dim=1).chunk(2)
        ...     return {"image_features": images, "text_features": texts, "logit_scale": scale}
        >>> micro_batches = [torch.randn(2, 16, 8) for _ in range(4)]  # 4 x 16 pairs
        >>> loss = accumulate_wrapped(model, forward, micro_batches, lambda out: ClipLoss()(**out))
        >>> loss.shape, tower.weight.grad.shape
        (torch.Size([]), torch.Size([4, 8]))
    """
    whole = functools.partial(
        accumulate, forward, micro_batches, loss, shared=shared, constant=constant
    )
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return whole(scale_loss=scale_loss, context=functools.partial(_reduce_last, wrapped))
    if not _is_deepspeed(wrapped):
        return whole(scale_loss=scale_loss)
    engine: Any = wrapped
    if scale_loss is not None:
        raise ValueError("scale_loss: DeepSpeed's engine has a loss scale of its own; leave it out")
    if (counted := engine.gradient_accumulation_steps()) != 1:
        raise ValueError(
            f"DeepSpeed's engine has gradient_accumulation_steps {counted}, and would divide every "
            'gradient by it; give it 1, and "train_micro_batch_size_per_gpu" a whole batch'
        )
    scale = getattr(engine.optimizer, "loss_scale", 1.0)
    reduction = (
        engine.coalesce_grad_reduction() if len(micro_batches) > 1 else contextlib.nullcontext()
    )
    with reduction:
        return whole(
            # DeepSpeed scales each backward; gradients of float16 features need it before
            scale_loss=lambda value: value * scale,
            backward=lambda value: engine.backward(value / scale, scale_wrt_gas=False),
        )


def _reduce_last(
    wrapped: nn.parallel.DistributedDataParallel, last: bool
) -> AbstractContextManager[Any]:
    return contextlib.nullcontext() if last else wrapped.no_sync()


def _is_deepspeed(wrapped: nn.Module) -> bool:
    """Whether it is DeepSpeed's engine, which is there only if DeepSpeed was imported."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(wrapped, deepspeed.DeepSpeedEngine)
