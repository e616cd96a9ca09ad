"""Losses of small batches: S whole in memory, with the least work on the host.

Where S has few entries, a step's time is the number of calls and not their work. Here a loss is one
plain autograd function (`dense_step.py`) with one call into the native library forward and one
backward. S stays in float32 from the one to the other.

A call that is out of the ordinary in any way is left to the other modules: functions here then
return None. That is one that is traced or transformed, is of several processes, asks for a backend,
a chunk or that nothing is kept, or has arguments that may deserve an error. So the checks here are
fast and silent.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastclip import native
from fastclip.ops.backend import ENVIRONMENT_VARIABLE
from fastclip.ops.chunks import without
from fastclip.ops.dense_step import Call, dense_loss

ENTRIES = {"cpu": 2048 * 2048}
"""By device type the entries of the largest S that is held whole; 16 MiB in float32."""

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)


class Request(NamedTuple):
    """The options that every loss takes, as they are given."""

    reduction: str
    backend: str
    chunk_bytes: int | None
    keep_bytes: int | None
    precision: str
    dist: str | None
    group: object
    sizes: object


def switched_off() -> AbstractContextManager[None]:
    """Inside, no S is held whole: memory is linear in the batch at every size."""
    return without(ENTRIES)


def pairs_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    request: Request,
    *,
    both: bool,
    smoothing: float = 0.0,
    positive_index: Tensor | None = None,
    groups: tuple[Tensor | None, Tensor | None] = (None, None),
    bank: Tensor | None = None,
    in_batch: bool = True,
    accuracies: Sequence[str] = (),
    metrics: dict[str, Tensor] | None = None,
) -> Tensor | None:
    """The softmax loss of rows or, with `both`, the mean of rows' and columns'.

    Arguments are those of `fastclip.functional.clip_loss` and `info_nce_loss`; `groups` are a row's
    and a column's. `metrics` receives `accuracies`.
    """
    if not _is_ordinary(request) or not _fit(x, (y,) if bank is None else (y, bank)):
        return None
    n, own = x.shape[0], y.shape[0]
    m = own if bank is None else own + bank.shape[0]
    number, address, leaf = _scalar(scale)
    if address is None or n * m > ENTRIES["cpu"] or (positive_index is None and n > own):
        return None
    asked = n, m, number, address, both, 0 if in_batch else own, smoothing
    ids: tuple[Tensor, ...] = ()
    row_group, column_group = groups
    if positive_index is not None:
        if not _are_ids(positive_index, n):
            return None
        ids = (positive_index.contiguous().long(),)
        table = native.library().dense_pairs(*asked, positive_index=ids[0].data_ptr())
    elif row_group is not None or column_group is not None:
        if not (_are_ids(row_group, n) and _are_ids(column_group, m)):
            return None
        assert row_group is not None and column_group is not None
        dtype = torch.promote_types(row_group.dtype, column_group.dtype)
        ids = row_group.to(dtype).contiguous(), column_group.to(dtype).contiguous()
        table = native.library().dense_pairs(
            *asked,
            row_id=ids[0].data_ptr(),
            column_id=ids[1].data_ptr(),
            id_bytes=dtype.itemsize,
        )
    else:
        table = native.library().dense_pairs(*asked)
    accuracy = None if metrics is None else torch.empty(len(accuracies))
    call = Call(table, request.reduction, _rounding(x, request), False, accuracy, ids, bank)
    loss = dense_loss(call, leaf, None, x, y)
    if metrics is not None and accuracy is not None:
        metrics.update(zip(accuracies, accuracy.unbind(), strict=True))
    return loss


def sigmoid_loss(
    x: Tensor, y: Tensor, scale: Tensor | float, offset: Tensor | float | None, request: Request
) -> Tensor | None:
    """`fastclip.functional.siglip_loss`."""
    if not _is_ordinary(request) or not _fit(x, (y,)):
        return None
    n = x.shape[0]
    number, address, scale_leaf = _scalar(scale)
    shift, shift_address, offset_leaf = _scalar(0.0 if offset is None else offset)
    if address is None or shift_address is None or y.shape[0] != n or n * n > ENTRIES["cpu"]:
        return None
    table = native.library().dense_sigmoid(n, number, address, shift, shift_address)
    call = Call(table, request.reduction, _rounding(x, request))
    return dense_loss(call, scale_leaf, offset_leaf, x, y)


def blocks_loss(
    features: Sequence[Tensor],
    domains: Sequence[int],
    scale: Tensor | float,
    offset: Tensor | float | None,
    weight: Tensor | Sequence[Sequence[float]] | None,
    request: Request,
    metrics: dict[str, Tensor] | None = None,
) -> Tensor | None:
    """`fastclip.functional.mp_nce_loss`."""
    if not _is_ordinary(request) or len(features) < 2 or len(features) != len(domains):
        return None
    first, least, count = features[0], min(domains), max(domains) + 1
    if not _fit(first, features[1:]) or any(one.shape != first.shape for one in features):
        return None
    if weight is not None:
        if min(len(weight), *map(len, weight)) < count:
            return None
        if not isinstance(weight, Tensor):
            weight = torch.tensor([list(row) for row in weight])
    tables = [
        _table(scale, count),
        _table(0.0 if offset is None else offset, count),
        _table(1.0 if weight is None else weight, count),
    ]
    entries = (len(features) * first.shape[0]) ** 2
    if entries > ENTRIES["cpu"] or least < 0 or any(address is None for _, address, *_ in tables):
        return None
    scale_leaf, offset_leaf, weight_leaf = (leaf for *_, leaf in tables)
    if weight_leaf is not None and weight_leaf.requires_grad:
        return None
    described = [entry for table in tables for entry in table[:3]]
    table = native.library().dense_blocks(first.shape[0], domains, *described)
    accuracy = None if metrics is None else torch.empty(())
    call = Call(table, request.reduction, _rounding(first, request), True, accuracy)
    loss = dense_loss(call, scale_leaf, offset_leaf, *features)
    if metrics is not None and accuracy is not None:
        metrics["accuracy"] = accuracy
    return loss


def labels_loss(
    z: Tensor, labels: Tensor, scale: Tensor | float, request: Request
) -> Tensor | None:
    """`fastclip.functional.sup_con_loss`, by the inverse of its temperature."""
    if not _is_ordinary(request) or not _fit(z):
        return None
    m = z.shape[0]
    number, address, leaf = _scalar(scale)
    if address is None or m * m > ENTRIES["cpu"] or not _are_ids(labels, m):
        return None
    labels = labels.contiguous()
    table = native.library().dense_labels(m, number, address, labels.data_ptr(), labels.itemsize)
    call = Call(table, request.reduction, _rounding(z, request), True, ids=(labels,))
    return dense_loss(call, leaf, None, z)


def _is_ordinary(request: Request) -> bool:
    """Whether nothing watches this call, and it asks for nothing that others do better."""
    return (
        not torch.compiler.is_compiling()
        and request.backend == "auto"
        and request.chunk_bytes is None
        and (request.keep_bytes is None or request.keep_bytes > 0)
        and request.dist is None
        and request.group is None
        and request.sizes is None
        and request.precision in ("auto", "input")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
        and ENVIRONMENT_VARIABLE not in os.environ
        and native.has_float_product()
    )


def _fit(x: Tensor, others: Sequence[Tensor] = ()) -> bool:
    """Whether features are plain ones in the CPU's memory, alike in all but their rows."""
    if type(x) not in _PLAIN or x.ndim != 2 or not x.is_cpu or 0 in x.shape:
        return False
    width, dtype = x.shape[1], x.dtype
    for y in others:
        if type(y) not in _PLAIN or y.ndim != 2 or not y.is_cpu or 0 in y.shape:
            return False
        if y.shape[1] != width or y.dtype != dtype:
            return False
    return dtype in _DTYPES


def _rounding(x: Tensor, request: Request) -> torch.dtype | None:
    """What features are rounded to before they enter a product; None for float32 as it is."""
    dtype = x.dtype
    if request.precision == "auto" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return None if dtype == x.dtype == torch.float32 else dtype


def _are_ids(ids: Tensor | None, rows: int) -> bool:
    return type(ids) is Tensor and ids.is_cpu and ids.shape == (rows,) and ids.dtype in _INTEGERS


def _scalar(value: Tensor | float) -> tuple[float, int | None, Tensor | None]:
    """A scalar as a number, as an address or 0, and as a tensor; no address where it is neither."""
    if isinstance(value, Tensor):
        if type(value) not in _PLAIN or value.numel() != 1 or not value.is_cpu:
            return 0.0, None, None
        if value.dtype != torch.float32:
            value = value.float()
        return 0.0, value.data_ptr(), value
    return (value, 0, None) if isinstance(value, (int, float)) else (0.0, None, None)


def _table(value: Tensor | float, domains: int) -> tuple[float, int | None, int, Tensor | None]:
    """As `_scalar`, with the width of a table by pair of domains before the tensor, or 0."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        number, address, leaf = _scalar(value)
        return number, address, 0, leaf
    width = value.shape[0]
    if type(value) not in _PLAIN or value.shape != (width, width) or not value.is_cpu:
        return 0.0, None, 0, None
    if width < domains:
        return 0.0, None, 0, None
    value = value.float().contiguous()
    return 0.0, value.data_ptr(), width, value
