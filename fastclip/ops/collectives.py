"""What the processes that share a batch send to each other, and a count of it.

A rank owns the rows of its samples. Two exchanges bring it the columns of the others:

    gather  all columns at once; partial gradients go home in one all-to-all
    ring    one rank's columns after the other, the next under way while a block is computed;
            each block's partial gradient is sent straight home: memory O(n D)

In both only one side of S travels. Maxima and sums of columns (8 bytes a column) go to their
owners, and what their gradient needs is gathered from there (8 bytes again). Partial gradients
travel in the features' dtype (`columns.exchange_dtype`); their owner sums them in the
accumulator's, in a fixed order, so a partial is rounded once and results are bitwise reproducible.

`columns.py` holds the operators' view of it. Processes may have different numbers of rows.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

# An operator's first call imports this too, and its functions' defaults keep the process group that
# there is by then: it would not end where it is destroyed, and its threads may abort Python's exit.
import torch.distributed.nn
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fastclip.ops.compiling import constant_in_graphs
from fastclip.ops.gemm import accumulator_dtype

EXCHANGES = ("gather", "ring")
Exchange = Literal["gather", "ring"]
CHECK_SIZES = "FASTCLIP_CHECK_SIZES"
# renamed in torch 2.14
_ALL_GATHER = (
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)


@dataclass
class ByteCount:
    """What this process received inside one `count_bytes()` block."""

    received: int = 0


_counts: list[ByteCount] = []


@contextmanager
def count_bytes() -> Iterator[ByteCount]:
    """Count the bytes that this process receives in the operators' exchanges inside the block.

    What a bandwidth-optimal algorithm brings over the wire: own parts, which never leave the
    process, are not counted, padding is.
    """
    count = ByteCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def _received(tensor: Tensor, share: float = 1.0) -> None:
    for count in _counts:
        count.received += round(tensor.numel() * tensor.element_size() * share)


class Ranks(NamedTuple):
    """The processes that share a batch, as plain values, which operators and graphs can hold.

    exchange: "gather" or "ring"; group: the process group's name; sizes: the rows of every rank.
    """

    exchange: str
    group: str
    sizes: tuple[int, ...]
    rank: int

    @property
    def rows(self) -> int:
        """The rows of all ranks."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """The number of this rank's first row among all."""
        return sum(self.sizes[: self.rank])

    def columns(self, columns: int) -> tuple[int, ...]:
        """The columns of every rank, where this one has `columns`.

        Raises:
            ValueError: the ranks differ in rows, and columns are no multiple of them.
        """
        own = self.sizes[self.rank]
        if len(set(self.sizes)) == 1:
            return (columns,) * len(self.sizes)
        if columns % own:
            raise ValueError(
                f"{columns} columns for {own} rows: where sizes differ, every rank needs the same "
                "number of columns a row"
            )
        return tuple(size * (columns // own) for size in self.sizes)


def check_exchange(exchange: str | None) -> None:
    """The `dist` of a loss.

    Raises:
        ValueError: it is none of `EXCHANGES`, nor None.
    """
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"dist is {exchange!r}; use 'gather', 'ring' or None")


def ranks_of(
    exchange: str | None,
    group: dist.ProcessGroup | None,
    sizes: Sequence[int] | None,
    rows: int,
) -> Ranks | None:
    """The `dist`, `group` and `sizes` arguments of a loss; None where one process works alone.

    Args:
        exchange: "gather", "ring" or None.
        group: the process group; None is the default one.
        sizes: rows of every rank; None means that all have as many as this one.
        rows: this rank's.

    Raises:
        ValueError: the arguments do not fit together, or no process group exists; with
            FASTCLIP_CHECK_SIZES=1 also: the ranks have other rows than `sizes` says.
    """
    if exchange is None:
        if group is not None or sizes is not None:
            raise ValueError("group and sizes are for losses over several processes; give dist")
        return None
    check_exchange(exchange)
    name, rank, world = _place(group)
    shares = (rows,) * world if sizes is None else tuple(sizes)
    compare_sizes("rows", rows, shares, name)
    if len(shares) != world or shares[rank] != rows or min(shares) < 1:
        raise ValueError(
            f"sizes are {shares} with {rows} rows on rank {rank} of {world}; give every rank's "
            "rows, each at least 1"
        )
    return None if world == 1 else Ranks(exchange, name, shares, rank)


@constant_in_graphs  # a graph is compiled for the processes that share it
def _place(group: dist.ProcessGroup | None) -> tuple[str, int, int]:
    """The group's name, this process's rank in it, and the number of ranks."""
    _check_initialized()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group that the loss is to be shared in")
    return group_name(group), rank, dist.get_world_size(group)


def compare_sizes(what: str, own: int, sizes: Sequence[int], group: str) -> None:
    """Whether every rank has what `sizes` says, asked of all ranks where FASTCLIP_CHECK_SIZES=1.

    One more exchange a call, so that it is a switch: without, ranks that differ abort in gloo, and
    may hang in NCCL. Compiled graphs leave it out.

    Args:
        what: "rows" or "columns".
        own: this rank's number of them.
        sizes: what this rank expects of every rank.
        group: the process group's name.

    Raises:
        ValueError: some rank has another number, or expects other numbers; on all ranks alike.
    """
    if torch.compiler.is_compiling() or os.environ.get(CHECK_SIZES) != "1":
        return
    handle = _handle(group)
    found: list[Any] = [None] * dist.get_world_size(handle)
    dist.all_gather_object(found, (own, tuple(sizes)), group=handle)
    numbers = tuple(number for number, _ in found)
    remedy = "give all ranks the same number of columns a row"
    if what == "rows":
        remedy = "give every rank's rows as sizes, the same on all, or drop the last, shorter batch"
    for rank, (_, expected) in enumerate(found):
        if expected != numbers:
            raise ValueError(
                f"the processes have {numbers} {what}, but rank {rank} expects {expected}; {remedy}"
            )


def check_columns(ranks: Ranks | None, columns: int) -> None:
    """That a rank's columns can be shared out, before anything is sent.

    Raises:
        ValueError: see `Ranks.columns` and `compare_sizes`.
    """
    if ranks is not None:
        compare_sizes("columns", columns, ranks.columns(columns), ranks.group)


def rank_in(group: str) -> int:
    """This process's rank in the group of that name."""
    return dist.get_rank(_handle(group))


def _check_initialized() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "a loss over several processes (dist, world_size above 1) needs "
            "torch.distributed.init_process_group first; a process alone leaves both out"
        )


@constant_in_graphs
def group_name(group: dist.ProcessGroup | None) -> str:
    """The name that an operator knows a process group by; None is the default one."""
    _check_initialized()
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return group.group_name


def _handle(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def all_gather_rows(
    group: str, own: Tensor, sizes: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """The rows of all ranks in their order, into `out` where it is given."""
    handle = _handle(group)
    own = own.contiguous()
    widest, shape = max(sizes), own.shape[1:]
    if out is None:
        out = own.new_empty((sum(sizes), *shape))
    if min(sizes) == widest:
        getattr(dist, _ALL_GATHER)(out, own, group=handle)
        _received(out, 1 - 1 / len(sizes))
        return out
    # collectives want one size: shorter ranks send rows that nobody reads
    padded = own.new_empty((widest, *shape))
    padded[: len(own)] = own
    everything = own.new_empty((len(sizes) * widest, *shape))
    getattr(dist, _ALL_GATHER)(everything, padded, group=handle)
    _received(everything, 1 - 1 / len(sizes))
    parts = zip(everything.split(widest), sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts], out=out)


def all_to_all_rows(group: str, outgoing: Tensor, sizes: Sequence[int], rank: int) -> list[Tensor]:
    """What every other rank had for this one, in their order.

    Args:
        outgoing: rows for every rank but this one, in the order of the ranks.
        sizes: rows of every rank; each block that is received has this rank's.
    """
    own, others = sizes[rank], len(sizes) - 1
    incoming = outgoing.new_empty((own * others, *outgoing.shape[1:]))
    dist.all_to_all_single(
        incoming,
        outgoing,
        [own * (q != rank) for q in range(len(sizes))],
        [size * (q != rank) for q, size in enumerate(sizes)],
        group=_handle(group),
    )
    _received(incoming)
    return list(incoming.split(own))


def split_own(rows: Tensor, sizes: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """A rank's rows, and those of the others in one tensor."""
    blocks = list(rows.split(list(sizes)))
    own = blocks.pop(rank)
    return own, torch.cat(blocks)


def all_reduce_sum(group: str, tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, of one shape, on all ranks."""
    total = tensor.clone()
    handle = _handle(group)
    dist.all_reduce(total, group=handle)
    _received(total, 2 * (1 - 1 / dist.get_world_size(handle)))
    return total


class Swap:
    """Tensors under way to one rank and from another; `wait()` before the buffers are read."""

    def __init__(self, group: str, outgoing: Tensor, to: int, incoming: Tensor, frm: int, tag: int):
        handle = _handle(group)
        # held until it has left
        self.outgoing, self.incoming = outgoing, incoming
        send, receive = (
            dist.P2POp(way, tensor, dist.get_global_rank(handle, peer), handle, tag)
            for way, tensor, peer in ((dist.isend, outgoing, to), (dist.irecv, incoming, frm))
        )
        self._works = dist.batch_isend_irecv([send, receive])
        _received(incoming)

    def wait(self) -> Tensor:
        """What was received."""
        for work in self._works:
            work.wait()
        return self.incoming


@torch.library.custom_op("fastclip::global_sum", mutates_args=())
def _global_sum(local: Tensor, group: str) -> Tensor:
    return all_reduce_sum(group, local)


@_global_sum.register_fake
def _(local: Tensor, group: str) -> Tensor:
    return torch.empty_like(local)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _times_world(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    return upstream * dist.get_world_size(_handle(*ctx.arguments)), None


_global_sum.register_autograd(_times_world, setup_context=_keep_arguments)


def all_reduce_loss(local: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum over all ranks, on all ranks; a small tensor.

    Its gradient is the world's size times the upstream's, so that data-parallel averaging of the
    gradients of a loss that every rank holds whole gives the full batch's.
    """
    return local if ranks is None else _global_sum(local, ranks.group)


def gather_rows(
    features: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    with_grad: bool,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The rows of all ranks in their order, (sum of sizes, D).

    With gradient, a rank receives the sum over all ranks of the gradients of its rows: each
    rank's loss contributes. Without, only the rank's own rows carry gradient, its own loss's.

    Args:
        features: (N, D).
        group: the process group; None is the default one.
        with_grad: whether gradients flow back across ranks.
        sizes: N of every rank; None: all the same.
    """
    name, rank, world = _place(group)
    sizes = [features.shape[0]] * world if sizes is None else list(sizes)
    compare_sizes("rows", features.shape[0], sizes, name)
    if with_grad:
        gathered: Tensor = _gather_rows(features, name, sizes, rank)
        return gathered
    parts = list(_gather_rows(features.detach(), name, sizes, rank).split(sizes))
    parts[rank] = features
    return torch.cat(parts)


@torch.library.custom_op("fastclip::gather_rows", mutates_args=())
def _gather_rows(features: Tensor, group: str, sizes: Sequence[int], rank: int) -> Tensor:
    return all_gather_rows(group, features, sizes)


@_gather_rows.register_fake
def _(features: Tensor, group: str, sizes: list[int], rank: int) -> Tensor:
    return features.new_empty((sum(sizes), *features.shape[1:]))


@torch.library.custom_op("fastclip::gather_rows_backward", mutates_args=())
def _gather_rows_gradient(upstream: Tensor, group: str, sizes: Sequence[int], rank: int) -> Tensor:
    own, others = split_own(upstream, sizes, rank)
    # rounded once, however many ranks there are
    total = own.to(accumulator_dtype(own.dtype), copy=True)
    for received in all_to_all_rows(group, others, sizes, rank):
        total += received
    return total.to(own.dtype)


@_gather_rows_gradient.register_fake
def _(upstream: Tensor, group: str, sizes: list[int], rank: int) -> Tensor:
    return upstream.new_empty((sizes[rank], *upstream.shape[1:]))


def _send_home(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
    return _gather_rows_gradient(upstream, *ctx.arguments), None, None, None


def _gather_again(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
    return _gather_rows(upstream, *ctx.arguments), None, None, None


_gather_rows.register_autograd(_send_home, setup_context=_keep_arguments)
_gather_rows_gradient.register_autograd(_gather_again, setup_context=_keep_arguments)


@torch.library.custom_op("fastclip::average_gradient", mutates_args=())
def _average_gradient(tensor: Tensor, group: str) -> Tensor:
    return tensor.clone()


@_average_gradient.register_fake
def _(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("fastclip::rank_mean", mutates_args=())
def _rank_mean(local: Tensor, group: str) -> Tensor:
    total = all_reduce_sum(group, local.to(accumulator_dtype(local.dtype)))
    return (total / dist.get_world_size(_handle(group))).to(local.dtype)


@_rank_mean.register_fake
def _(local: Tensor, group: str) -> Tensor:
    return torch.empty_like(local)


def _average(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    return _rank_mean(upstream, *ctx.arguments), None


# the mean over ranks is its own derivative
_rank_mean.register_autograd(_average, setup_context=_keep_arguments)
_average_gradient.register_autograd(_average, setup_context=_keep_arguments)


def gather_rows_with_grad(own: Tensor, ranks: Ranks, sizes: Sequence[int]) -> Tensor:
    """The rows of all ranks with gradient, where rank q has sizes[q] of them."""
    gathered: Tensor = _gather_rows(own, ranks.group, list(sizes), ranks.rank)
    return gathered


def average_gradient(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensor itself, whose gradient is averaged over the ranks."""
    same: Tensor = _average_gradient(tensor, group_name(group))
    return same


def all_reduce_sum_with_grad(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over all ranks, on all ranks; its gradient is the sum of all ranks' upstreams.

    For statistics that every rank uses in a loss of its own, as batch normalization does.
    """
    name = group_name(group)
    # backward the average of the upstreams first, then the world's size times it
    total: Tensor = _average_gradient(_global_sum(local, name), name)
    return total


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor itself, whose gradient is multiplied by a factor."""
    same: Tensor = _ScaleGradient.apply(tensor, factor)
    return same


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
