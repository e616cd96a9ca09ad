"""What a training step costs each rank, in bytes and FLOP: pure functions of sizes.

Names: N global batch, W ranks (one a GPU), n = N / W rows of a rank, D width of the features,
b bytes of a feature in the loss, P parameters, k micro-batches a step.
"""

from typing import NamedTuple

from fastclip.device import AUTOCAST_DTYPES
from fastclip.ops.chunks import chunk_rows
from fastclip.ops.kept import KEEP_BYTES, in_whole_tiles

ENGINES = ("torch", "zero1", "zero2", "zero3", "fsdp")
EXCHANGES = ("gather", "ring")
# Products of n x N x D, forward and backward. Of symmetric losses the rows count in all blocks.
# Where the exponentials are kept, S is formed once less.
PRODUCTS = {"clip": 4, "siglip": 3, "symmetric": 3, "open_clip": 6}
KEPT_PRODUCTS = {**PRODUCTS, "clip": 3, "symmetric": 2}
SYMMETRIC_ALONE, KEPT_SYMMETRIC_ALONE = 2, 1.5
# In numbers: reduce_bucket_size of the shipped configurations, of which overlap_comm holds two;
# DeepSpeed's default of stage3_max_live_parameters.
ZERO_BUCKET = 200_000_000
ZERO_LIVE = 1_000_000_000
# The chunked implementation holds so many matrices of a chunk at once; the Triton kernels one.
CHUNK_MATRICES = 3
# FSDP2 holds so many copies of a block at once: whole, the next one and the buffer it comes in.
FSDP_BLOCKS = 3


class Sharding(NamedTuple):
    """What FSDP2 divides of a model.

    Attributes:
        rows: of each parameter, how many rows there are and the numbers in one; a parameter without
            dimensions has one row.
        outside: numbers in no block.
        largest: numbers in the largest block.
        exact_blocks: whether blocks stay float32 under autocast, as those with batch normalization.
    """

    rows: tuple[tuple[int, int], ...]
    outside: int
    largest: int
    exact_blocks: bool

    def share(self, ranks: int) -> int:
        """Numbers that a rank holds at most: of each parameter its rows, the last ranks fewer."""
        return sum(-(-rows // ranks) * each for rows, each in self.rows)


class LossBytes(NamedTuple):
    """What one rank receives in a step for the loss."""

    features: int
    features_again: int
    gradient_partials: int
    column_statistics: int
    column_gradients: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self)


def bytes_per_rank(
    loss: str, exchange: str, rows: int, ranks: int, width: int, b: int, blocks: int = 1
) -> LossBytes:
    """Bytes one rank receives for the features, their gradients and the columns' statistics.

    Args:
        loss: "clip", "siglip", "symmetric" (NT-Xent, SupCon, MP-NCE), or "open_clip" (its loss with
            local_loss and gather_with_grad).
        exchange: "gather" or "ring".
        rows: n. ranks: W. width: D.
        b: bytes of a feature as it is exchanged.
        blocks: views of a pair, of a symmetric loss.
    """
    statistics = 8 * (ranks - 1) * rows * blocks
    unit = (ranks - 1) * rows * blocks * width * b
    again = unit if exchange == "ring" else 0
    if loss == "open_clip":
        # images and texts, forward and backward
        return LossBytes(2 * unit, 0, 2 * unit, 0, 0)
    if loss == "siglip":
        return LossBytes(unit, 0, unit, 0, 0)
    if loss == "symmetric":
        # a rank owns its gradient whole, and no column is shared
        return LossBytes(unit, again, 0, 0, statistics)
    return LossBytes(unit, again, unit, statistics, statistics)


def reduction_bytes(
    engine: str, parameters: int, ranks: int, micro_batches: int, itemsize: int = 2
) -> int:
    """Bytes one rank receives in a step for parameters and their gradients.

    Data-parallel torch reduces float32 gradients once a step. ZeRO-1 scatters gradients and gathers
    parameters once; ZeRO-2 scatters once a micro-batch; ZeRO-3 does that too and gathers the
    parameters for every forward and every backward of a micro-batch instead. So does FSDP2, whose
    gradients are float32.

    Args:
        engine: one of `ENGINES`.
        itemsize: bytes of a parameter as it is gathered, and of a gradient under ZeRO.
    """
    share = (ranks - 1) * parameters / ranks
    if engine == "torch":
        return round(2 * share * 4)
    passes = 2 if micro_batches == 1 else 3
    if engine == "fsdp":
        return round((passes * itemsize + 4) * micro_batches * share)
    transfers = {"zero1": 2, "zero2": micro_batches + 1, "zero3": (1 + passes) * micro_batches}
    return round(transfers[engine] * share * itemsize)


def loss_flop(
    loss: str, rows: int, ranks: int, width: int, blocks: int = 1, kept: bool = False
) -> int:
    """FLOP of a rank's loss, forward and backward.

    Args:
        blocks: views of a pair, of a symmetric loss.
        kept: whether the exponentials of S are kept for the backward.
    """
    products: float = (KEPT_PRODUCTS if kept else PRODUCTS)[loss]
    if loss == "symmetric" and ranks == 1:
        products = KEPT_SYMMETRIC_ALONE if kept else SYMMETRIC_ALONE
    return int(products * 2) * (blocks * rows) * (blocks * rows * ranks) * width


def kept_bytes(loss: str, exchange: str, rows: int, ranks: int, b: int) -> int:
    """Of the exponentials that CLIP's kernels keep for the backward; 0 where they do not fit.

    They are in the dtype of S's gradient, which has as many bytes as a feature.
    """
    if loss != "clip":
        return 0
    columns, parts = rows * ranks, ranks if exchange == "ring" else 1
    size = in_whole_tiles(rows * columns, rows, columns, parts) * b
    return size if size <= KEEP_BYTES["cuda"] else 0


def tower_flop(forward: int, rows: int, *, accumulating: bool, checkpointing: bool) -> int:
    """FLOP of a rank's towers: a backward is two forwards, the two options add one each."""
    return forward * rows * (3 + accumulating + checkpointing)


def loss_memory(
    loss: str, exchange: str, rows: int, ranks: int, width: int, b: int, chunk_bytes: int = 0
) -> dict[str, int]:
    """Bytes of a rank's loss by part, all counted as if they were alive at once.

    Args:
        chunk_bytes: of the chunk of S; 0 is the operators' default on CUDA.
    """
    N, nD = rows * ranks, rows * width
    ring = exchange == "ring" and ranks > 1
    columns = rows if ring else N
    alone = ranks == 1
    chunk = chunk_rows(rows, columns, 4, chunk_bytes, "cuda") * columns * 4
    parts = {"own features": 2 * nD * b, "own gradients": 2 * nD * 4}
    if ring:
        parts |= {"two blocks of texts": 2 * nD * b, "a block's gradient": nD * 4}
        parts |= {"gradient partials, sent and received": 2 * nD * b}
    elif not alone:
        parts |= {"all texts": N * width * b, "all texts' gradient": N * width * 4}
        parts |= {"gradient partials, sent and received": 2 * N * width * b}
    # row and column (max, sum), log-sum-exps and upstream gradients; their partials by exchange
    statistics = 16 * rows + 16 * N + (0 if alone else 8 * N)
    parts["statistics"] = 8 * rows if loss == "siglip" else statistics
    parts["chunks of S"] = CHUNK_MATRICES * chunk
    parts["kept exponentials"] = kept_bytes(loss, exchange, rows, ranks, b)
    return parts


def state_memory(
    engine: str, parameters: int, ranks: int, precision: str, sharding: Sharding | None = None
) -> dict[str, int]:
    """Bytes of a rank's parameters, gradients, Adam's state and the engine's buffers.

    torch keeps float32 parameters under autocast. ZeRO has parameters and gradients in the low
    precision (float32 at fp32), a float32 master copy and two moments (12 bytes a parameter), and
    divides the latter by the ranks, at stage 2 also gradients, at stage 3 also parameters. FSDP2
    divides these by rows, all in float32. What is outside of blocks is whole from the forward to
    the end of the backward, a block while it runs; their gradients are until they are reduced.

    Args:
        engine: one of `ENGINES`.
        sharding: of the model, for FSDP2.
    """
    if engine == "torch":
        own = {"parameters": 4 * parameters, "gradients": 4 * parameters}
        return own | {"Adam": 8 * parameters}
    size = 4 if AUTOCAST_DTYPES[precision] is None else 2
    if engine == "fsdp":
        assert sharding is not None
        share = 4 * sharding.share(ranks)
        block = 4 if sharding.exact_blocks else size
        casts = size if size < 4 else 0
        return {
            "parameters": share,
            "gradients": share,
            "Adam": 2 * share,
            # with their gradients, and these again as they are reduced
            "whole parameters outside blocks": (3 * 4 + casts) * sharding.outside,
            # with the gradient of one, which is reduced while that of the one before is
            "whole blocks": ((FSDP_BLOCKS + 1) * block + 2 * 4) * sharding.largest,
        }
    stage = int(engine[-1])
    buffers = 2 * min(parameters, ZERO_BUCKET)
    if stage == 3:
        buffers += min(parameters, ZERO_LIVE)
    return {
        "parameters": size * parameters // (ranks if stage == 3 else 1),
        "gradients": size * parameters // (ranks if stage >= 2 else 1),
        "Adam": 12 * parameters // ranks,
        "buckets": size * buffers,
    }
