"""Losses of small batches: S whole in memory, with the least work on the host.

Where S has few entries, a step's time is the number of calls and not their work. Here a loss is one
plain autograd function: on a CPU with the native library one call into it forward and one backward
(`dense_step.py`), elsewhere a handful of launches (`dense_sweeps.py`). S stays unrounded from the
one to the other.

A call that is out of the ordinary in any way is left to the other modules: functions here then
return None. That is one that is traced or transformed, is of several processes, asks for a backend,
a chunk or that nothing is kept, or has arguments that may deserve an error. So the checks here are
fast and silent.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from fastclip import native
from fastclip.kernels.dense_matrix import Matrix
from fastclip.ops.backend import environment_backend, unavailable_reason
from fastclip.ops.checks import check_index, check_keep_bytes
from fastclip.ops.chunks import with_budgets
from fastclip.ops.dense_step import NativeCall, dense_loss, output
from fastclip.ops.dense_sweeps import SweepsCall, sweeps_loss
from fastclip.ops.gemm import accumulator_dtype

LOSSES = ("clip", "siglip", "info_nce", "nt_xent", "mp_nce", "sup_con")
# S is saved for the backward: no more than 16 MiB in float32, whatever the time
MOST_SAVED = 2048 * 2048
ENTRIES: dict[tuple[str, str], int] = {
    # by benchmarks/results/2026-11-29-cpu-whole.json: some losses gain up to 4096 rows
    **{("cpu", loss): MOST_SAVED for loss in LOSSES},
    # A prediction from the number of launches: no GPU has timed it. `benchmarks/gpu_lab.sh --stage
    # small` does.
    **{("cuda", loss): MOST_SAVED for loss in LOSSES},
}
"""By device type and loss the entries of the largest S held whole."""

# what offsets of 32 bits reach
MOST_ENTRIES = 2**31 - 1
# of a kernel's packed domains
MOST_BLOCKS, MOST_DOMAINS = 15, 16

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


class Request(NamedTuple):
    """The options that every loss takes, as they are given."""

    reduction: str
    backend: str
    chunk_bytes: int | None
    keep_bytes: int | None
    precision: str
    dist: str | None
    group: ProcessGroup | None
    sizes: Sequence[int] | None


def switched_off() -> AbstractContextManager[None]:
    """Inside, no S is held whole: memory is linear in the batch at every size."""
    return with_budgets(ENTRIES)


def switched_on() -> AbstractContextManager[None]:
    """Inside, S is held whole at every size."""
    return with_budgets(ENTRIES, MOST_ENTRIES)


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
    chosen = _small_batch_backend(request, x, (y,) if bank is None else (y, bank))
    if chosen is None:
        return None
    n, own = x.shape[0], y.shape[0]
    m = own if bank is None else own + bank.shape[0]
    table = _scalar(scale, x, chosen)
    limit = _most_entries(request, x, "clip" if both else "info_nce")
    if table is None or n * m > limit or (positive_index is None and n > own):
        return None
    index, ids = None, None
    row_group, column_group = groups
    if positive_index is not None:
        if not _are_ids(positive_index, n, x):
            return None
        check_index("positive_index", positive_index, own)
        index = positive_index.contiguous().long()
    elif row_group is not None or column_group is not None:
        if not (_are_ids(row_group, n, x) and _are_ids(column_group, m, x)):
            return None
        assert row_group is not None and column_group is not None
        dtype = torch.promote_types(row_group.dtype, column_group.dtype)
        ids = row_group.to(dtype).contiguous(), column_group.to(dtype).contiguous()
    first = 0 if in_batch else own
    if chosen == "native":
        options: dict[str, Any] = {}
        if index is not None:
            options["positive_index"] = index.data_ptr()
        if ids is not None:
            addresses = {"row_id": ids[0].data_ptr(), "column_id": ids[1].data_ptr()}
            options = {**addresses, "id_bytes": ids[0].itemsize}
        asked = n, m, *table.described, both, first, smoothing
        described = native.library().dense_pairs(*asked, **options)
        accuracy = None if metrics is None else output(len(accuracies))
        held = ids or (() if index is None else (index,))
        call = NativeCall(
            described, request.reduction, _rounding(x, request), False, accuracy, held, bank
        )
        loss = dense_loss(call, table.leaf, None, x, y)
    else:
        matrix = _matrix(x, "softmax", table)._replace(
            ids=ids,
            positive=index,
            pairs=n,
            beside=m,
            paired=n if both else 0,
            first_negative=first,
            smoothing=float(smoothing),
        )
        hits: list[Tensor] | None = None if metrics is None else []
        sweeps = SweepsCall(
            chosen, matrix, request.reduction, _compute_dtype(x, request), bank, hits
        )
        loss = sweeps_loss(sweeps, table.leaf, None, x, y)
        accuracy = None if not hits else hits[0].view(len(accuracies), n).to(loss.dtype).mean(dim=1)
    if metrics is not None and accuracy is not None:
        metrics.update(zip(accuracies, accuracy.unbind(), strict=True))
    return loss


def sigmoid_loss(
    x: Tensor, y: Tensor, scale: Tensor | float, offset: Tensor | float | None, request: Request
) -> Tensor | None:
    """`fastclip.functional.siglip_loss`."""
    chosen = _small_batch_backend(request, x, (y,))
    if chosen is None:
        return None
    n = x.shape[0]
    table, shift = _scalar(scale, x, chosen), _scalar(0.0 if offset is None else offset, x, chosen)
    if (
        table is None
        or shift is None
        or y.shape[0] != n
        or n * n > _most_entries(request, x, "siglip")
    ):
        return None
    if chosen == "native":
        described = native.library().dense_sigmoid(n, *table.described, *shift.described)
        call = NativeCall(described, request.reduction, _rounding(x, request))
        return dense_loss(call, table.leaf, shift.leaf, x, y)
    matrix = _matrix(x, "sigmoid", table, shift)._replace(pairs=n, beside=n)
    sweeps = SweepsCall(chosen, matrix, request.reduction, _compute_dtype(x, request))
    return sweeps_loss(sweeps, table.leaf, shift.leaf, x, y)


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
    count = len(features)
    if not 2 <= count <= MOST_BLOCKS or count != len(domains):
        return None
    first, least, most = features[0], min(domains), max(domains) + 1
    chosen = _small_batch_backend(request, first, features[1:])
    if chosen is None or any(one.shape != first.shape for one in features):
        return None
    if weight is not None:
        if min(len(weight), *map(len, weight)) < most:
            return None
        if not isinstance(weight, Tensor):
            weight = _filled(tuple(map(tuple, weight)), first.device)
    tables = [
        _table(scale, most, first, chosen),
        _table(0.0 if offset is None else offset, most, first, chosen),
        _table(1.0 if weight is None else weight, most, first, chosen),
    ]
    pairs = first.shape[0]
    limit = _most_entries(request, first, "nt_xent" if count == 2 else "mp_nce")
    if (count * pairs) ** 2 > limit or least < 0 or most > MOST_DOMAINS:
        return None
    of_scale, of_offset, of_weight = tables
    if of_scale is None or of_offset is None or of_weight is None:
        return None
    if of_weight.leaf is not None and of_weight.leaf.requires_grad:
        return None
    leaves = of_scale.leaf, of_offset.leaf
    if chosen == "native":
        given = (entry for one in (of_scale, of_offset, of_weight) for entry in one.of_domains)
        described = native.library().dense_blocks(pairs, domains, *given)
        accuracy = None if metrics is None else output()
        call = NativeCall(described, request.reduction, _rounding(first, request), True, accuracy)
        loss = dense_loss(call, *leaves, *features)
    else:
        matrix = _matrix(first, "softmax", of_scale, of_offset)._replace(
            weight=of_weight.operand,
            pairs=pairs,
            beside=pairs,
            domains=tuple(domains),
            symmetric=True,
        )
        hits: list[Tensor] | None = None if metrics is None else []
        dtype = _compute_dtype(first, request)
        sweeps = SweepsCall(chosen, matrix, request.reduction, dtype, None, hits)
        loss = sweeps_loss(sweeps, *leaves, *features)
        accuracy = None if not hits else hits[0].to(loss.dtype).mean() / (count - 1)
    if metrics is not None and accuracy is not None:
        metrics["accuracy"] = accuracy
    return loss


def labels_loss(
    z: Tensor, labels: Tensor, scale: Tensor | float, request: Request
) -> Tensor | None:
    """`fastclip.functional.sup_con_loss`, by the inverse of its temperature."""
    chosen = _small_batch_backend(request, z)
    if chosen is None:
        return None
    m, table = z.shape[0], _scalar(scale, z, chosen)
    limit = _most_entries(request, z, "sup_con")
    if table is None or m * m > limit or not _are_ids(labels, m, z):
        return None
    labels = labels.contiguous()
    if chosen == "native":
        described = native.library().dense_labels(
            m, *table.described, labels.data_ptr(), labels.itemsize
        )
        call = NativeCall(described, request.reduction, _rounding(z, request), True, ids=(labels,))
        return dense_loss(call, table.leaf, None, z)
    matrix = _matrix(z, "labels", table)._replace(
        ids=(labels, labels), pairs=m, beside=m, symmetric=True
    )
    sweeps = SweepsCall(chosen, matrix, request.reduction, _compute_dtype(z, request))
    return sweeps_loss(sweeps, table.leaf, None, z)


@functools.cache
def implementation(device: torch.device, dtype: torch.dtype) -> str | None:
    """What holds S whole there: "native", "triton" or "torch"; None if nothing does."""
    if device.type == "cpu":
        wide = dtype == torch.float64 or not native.has_float_product()
        return "torch" if wide else "native"
    if device.type == "cuda":
        return "torch" if unavailable_reason("similarity", "triton", device, dtype) else "triton"
    return None


def _small_batch_backend(request: Request, x: Tensor, others: Sequence[Tensor] = ()) -> str | None:
    """The implementation, where nothing is out of the ordinary.

    Nothing watches the call, it asks for nothing that others do better, and its features are plain
    ones in one memory, alike in all but their rows.
    """
    if (
        torch.compiler.is_compiling()
        or request.backend != "auto"
        or request.chunk_bytes is not None
        or request.dist is not None
        or request.group is not None
        or request.sizes is not None
        or request.precision not in ("auto", "input")
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or environment_backend() != "auto"
        or type(x) not in _PLAIN
        or x.layout is not torch.strided
        or x.ndim != 2
        or x.dtype not in _DTYPES
        or 0 in x.shape
    ):
        return None
    width, dtype, device = x.shape[1], x.dtype, x.device
    for y in others:
        if type(y) not in _PLAIN or y.ndim != 2 or y.device != device or 0 in y.shape:
            return None
        if y.layout is not torch.strided:
            return None
        if y.shape[1] != width or y.dtype != dtype:
            return None
    # kernels count the features' entries in 32 bits
    if any(one.shape[0] * max(width, one.stride(0)) > MOST_ENTRIES for one in (x, *others)):
        return None
    return implementation(device, dtype)


def _most_entries(request: Request, x: Tensor, loss: str) -> int:
    """Up to which size S is held whole: that where it is faster, within the caller's budget."""
    limit = ENTRIES[x.device.type, loss]
    if request.keep_bytes is None:
        return limit
    check_keep_bytes(request.keep_bytes)
    return min(limit, request.keep_bytes // accumulator_dtype(x.dtype).itemsize)


def _compute_dtype(x: Tensor, request: Request) -> torch.dtype:
    """What features are rounded to before they enter a product."""
    kind, dtype = x.device.type, x.dtype
    if request.precision == "input" or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def _rounding(x: Tensor, request: Request) -> torch.dtype | None:
    """The same; None for float32 as it is."""
    dtype = _compute_dtype(x, request)
    return None if dtype == x.dtype == torch.float32 else dtype


def _are_ids(ids: Tensor | None, rows: int, like: Tensor) -> bool:
    if type(ids) is not Tensor or ids.device != like.device:
        return False
    return ids.shape == (rows,) and ids.dtype in _INTEGERS


class _Table(NamedTuple):
    """A number, or a tensor of one element or, with its width, by pair of domains."""

    number: float
    leaf: Tensor | None
    width: int

    @property
    def described(self) -> tuple[float, int]:
        """The number, and the tensor's address or 0."""
        return self.number, 0 if self.leaf is None else self.leaf.data_ptr()

    @property
    def of_domains(self) -> tuple[float, int, int]:
        """The same, and the width."""
        return *self.described, self.width

    @property
    def operand(self) -> Tensor | float:
        """The tensor, or the number where there is none."""
        return self.number if self.leaf is None else self.leaf


def _scalar(value: Tensor | float, like: Tensor, chosen: str) -> _Table | None:
    """None where it is no plain scalar on the features' device."""
    if isinstance(value, Tensor):
        if type(value) not in _PLAIN or value.numel() != 1 or value.device != like.device:
            return None
        if not value.is_floating_point() or (chosen == "native" and value.dtype != torch.float32):
            value = value.float()
        # an address has no lazy sign
        return _Table(0.0, value.resolve_neg(), 0)
    return _Table(float(value), None, 0) if isinstance(value, (int, float)) else None


def _table(value: Tensor | float, domains: int, like: Tensor, chosen: str) -> _Table | None:
    """None where it is neither a scalar nor a table of so many domains at least."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return _scalar(value, like, chosen)
    width = value.shape[0]
    if type(value) not in _PLAIN or value.shape != (width, width) or value.device != like.device:
        return None
    if width < domains:
        return None
    if chosen == "native" or not value.is_floating_point():
        value = value.float()
    return _Table(0.0, value.contiguous().resolve_neg(), width)


@functools.lru_cache(maxsize=4096)
def _filled(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """A table of numbers: a copy to a device once and not in every step.

    As many as nobody has, since a captured graph reads where its table was.
    """
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _matrix(like: Tensor, kind: str, scale: _Table, offset: _Table | None = None) -> Matrix:
    """What is the same for most losses; `like` stands where the cosines will be."""
    return Matrix(
        cos=like,
        kind=kind,
        scale=scale.operand,
        offset=0.0 if offset is None else offset.operand,
        weight=1.0,
        ids=None,
        positive=None,
        pairs=0,
        beside=0,
        paired=0,
        domains=(0,),
        symmetric=False,
        first_negative=0,
        smoothing=0.0,
    )
