"""Forward and backward of a loss by way of S, whole: one call into the native library each.

Shape suffixes: N rows, M columns, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip import native
from fastclip.ops.gemm import count_product
from fastclip.ops.registration import is_last_use, no_double_backward

REDUCTION_CODES = {"none": 0, "sum": 1, "mean": 2}


class NativeCall:
    """What a loss is asked, from its forward to its backward.

    table: the library's description of it. reduction: a value of `REDUCTION_CODES`. dtype: what
    features are rounded to, None for those that enter as they are. accuracy: receives metrics. ids:
    tensors whose addresses the table has. bank: columns without gradient.
    """

    __slots__ = ("accuracy", "bank", "dtype", "ids", "is_symmetric", "reduction", "table")

    def __init__(
        self,
        table: Any,
        reduction: str,
        dtype: torch.dtype | None,
        is_symmetric: bool = False,
        accuracy: Tensor | None = None,
        ids: tuple[Tensor, ...] = (),
        bank: Tensor | None = None,
    ) -> None:
        self.table, self.reduction, self.dtype = table, REDUCTION_CODES[reduction], dtype
        self.is_symmetric, self.accuracy, self.ids, self.bank = is_symmetric, accuracy, ids, bank

    def operand(self, features: tuple[Tensor, ...]) -> Tensor:
        """Blocks of rows as they enter a product, rounded for autocast once."""
        if self.dtype is not None:
            dtypes = [self.dtype]
            if self.dtype != torch.bfloat16 or not native.has_bf16_product():
                dtypes.append(torch.float32)
            for dtype in dtypes:
                features = tuple(one.to(dtype) for one in features)
        rows = features[0] if len(features) == 1 else torch.cat(features)
        # the library reads memory, and would miss torch's bit for a lazy negation
        return rows.resolve_neg().contiguous()


class Dense(torch.autograd.Function):
    """A loss by way of S.

    Inputs are a `NativeCall`, the scale and the offset where they are tensors, and the features: X
    and Y or, where S is symmetric, its blocks.
    """

    @staticmethod
    def forward(
        ctx: Any, call: NativeCall, scale: Tensor | None, offset: Tensor | None, *features: Tensor
    ) -> Tensor:
        if call.is_symmetric:
            x_ND = y_MD = call.operand(features)
        else:
            x_ND = call.operand(features[:1])
            y_MD = call.operand(features[1:] if call.bank is None else (features[1], call.bank))
        table = call.table
        room = output(table.room)
        loss = output() if call.reduction else output(table.anchors)
        n, width = x_ND.shape
        count_product(n, width, y_MD.shape[0])
        table.forward(
            room.data_ptr(),
            x_ND.data_ptr(),
            y_MD.data_ptr(),
            width,
            x_ND.dtype == torch.bfloat16,
            loss.data_ptr(),
            0 if call.accuracy is None else call.accuracy.data_ptr(),
            call.reduction,
            torch.get_num_threads(),
        )
        ctx.set_materialize_grads(False)
        if True in ctx.needs_input_grad:
            # what features became, where they did not enter as they are
            made = () if x_ND is features[0] and y_MD is features[-1] else (x_ND, y_MD)
            ctx.save_for_backward(room, scale, offset, *features, *made, *call.ids)
            ctx.call = call, len(features), len(made)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if upstream is None:
            return (None,) * len(needs)
        call, count, made = ctx.call
        saved = ctx.saved_tensors
        room, inputs = saved[0], saved[1 : 3 + count]
        sides = saved[3 + count : 5 + count] if made else (inputs[2], inputs[-1])
        # S gives way to its gradient, unless the graph is kept
        room = room if is_last_use((room,)) else room.clone()
        found = _gradients(call, room, sides, upstream, inputs, needs[1:])
        return None, *once(found, inputs)


def output(*shape: int) -> Tensor:
    """Where the library writes: whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _gradients(
    call: NativeCall,
    room: Tensor,
    operands: Sequence[Tensor],
    upstream: Tensor,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Those by the inputs; `room` is overwritten."""
    x_ND, y_MD = operands
    upstream = upstream.resolve_neg().contiguous()
    n, width = x_ND.shape
    need_x = True in needs[2:] if call.is_symmetric else needs[2]
    scale = output(*inputs[0].shape) if needs[0] else None
    offset = output(*inputs[1].shape) if needs[1] else None
    dx, dy, own = None, None, 0
    if need_x:
        count_product(n, y_MD.shape[0], width)
        dx = output(n, width)
    if not call.is_symmetric and needs[3]:
        # a bank's columns have none
        own = inputs[3].shape[0]
        count_product(own, n, width)
        dy = output(own, width)
    call.table.backward(
        room.data_ptr(),
        x_ND.data_ptr(),
        y_MD.data_ptr(),
        width,
        x_ND.dtype == torch.bfloat16,
        upstream.data_ptr(),
        call.reduction,
        0 if dx is None else dx.data_ptr(),
        0 if dy is None else dy.data_ptr(),
        own,
        0 if scale is None else scale.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        torch.get_num_threads(),
    )
    features = inputs[2:]
    sides: Sequence[Tensor | None] = (dx, dy)
    if call.is_symmetric:
        sides = (dx,) if dx is None or len(features) == 1 else dx.split(features[0].shape[0])
        sides = (*sides, *(None,) * (len(features) - len(sides)))
    if call.dtype is None and False not in needs[2:]:
        return [scale, offset, *sides]
    found = [
        side.to(value.dtype) if need and side is not None else None
        for side, need, value in zip(sides, needs[2:], features, strict=True)
    ]
    return [scale, offset, *found]


def dense_loss(
    call: NativeCall, scale: Tensor | None, offset: Tensor | None, *features: Tensor
) -> Tensor:
    """The loss that `call` describes; see `Dense`."""
    loss: Tensor = Dense.apply(call, scale, offset, *features)
    return loss


def once(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients; with create_graph=True, behind a node that refuses a second derivative."""
    if not torch.is_grad_enabled():
        return found
    pairs = zip(found, inputs, strict=True)
    return [None if g is None else _Once.apply(g, value) for g, value in pairs]


class _Once(torch.autograd.Function):
    """A gradient in a graph that leads to its input, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor) -> Tensor:
        return gradient.clone()

    backward = staticmethod(no_double_backward)
