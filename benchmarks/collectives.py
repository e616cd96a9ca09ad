"""Losses over several processes beside the open_clip losses: bytes exchanged, time, memory, error.

Every process holds `n` pairs. Real processes: NCCL where there is a GPU for each, gloo elsewhere;
gloo's time on one machine says what the exchange costs in copies, not what a network does. Bytes
are counted at torch.distributed's own functions, on our side and on open_clip's alike, as what a
bandwidth-optimal algorithm brings over the wire to one process.
"""

import itertools
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.bench.memory import saved_bytes
from fastclip.bench.runner import CannotRunHere, Inputs, clustered, quantile, relative, status_of
from fastclip.functional import clip_loss, siglip_loss

Loss = Callable[..., Tensor]

OPERATORS: dict[str, Loss] = {"clip": clip_loss, "siglip": siglip_loss}


@dataclass(frozen=True)
class CollectiveSettings:
    """How to measure: device is cpu (gloo) or cuda (NCCL)."""

    scale: float = 14.3
    rounds: int = 15
    warmup: int = 2
    device: str = "cpu"


@dataclass
class CollectiveRow:
    """One loss over `ranks` processes of `n` pairs each.

    Attributes:
        received_bytes: by the first process, forward and backward.
        p20, p50, p80: seconds forward and backward, of the slowest process.
        ratio: this median over that of fastclip's gather.
        saved_bytes: what the first process keeps for its backward, its own features left out.
        error: of the first process's dX, relative to one process's over all pairs in float64.
    """

    operator: str
    baseline: str
    ranks: int
    n: int
    width: int
    status: str = "ok"
    received_bytes: int | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    saved_bytes: int | None = None
    error: float | None = None


def implementations(operator: str, rank: int, world: int) -> dict[str, Callable[[], Loss]]:
    """All implementations of a loss over processes, fastclip first; each imports what it needs."""

    def clip(local: bool) -> Callable[[], Loss]:
        def build() -> Loss:
            from open_clip.loss import ClipLoss

            return ClipLoss(local, True, rank=rank, world_size=world)

        return build

    def siglip(exchange: str) -> Callable[[], Loss]:
        def build() -> Loss:
            from open_clip.loss import SigLipLoss

            return SigLipLoss(rank=rank, world_size=world, dist_impl=exchange)

        return build

    ours = OPERATORS[operator]
    found: dict[str, Callable[[], Loss]] = {
        f"fastclip {exchange}": lambda exchange=exchange: (
            lambda *inputs: ours(*inputs, dist=exchange)
        )  # type: ignore
        for exchange in ("gather", "ring")
    }
    if operator == "clip":
        return {**found, "open_clip local": clip(True), "open_clip global": clip(False)}
    exchange_names = ("bidir", "shift", "reduce", "gather")
    return {**found, **{f"open_clip {exchange}": siglip(exchange) for exchange in exchange_names}}


def run(
    names: Sequence[str],
    worlds: Sequence[int],
    sizes: Sequence[int],
    width: int,
    settings: CollectiveSettings,
    add: Callable[[list[CollectiveRow]], None],
) -> list[CollectiveRow]:
    """Measure every loss, world and size; `add` receives the rows of each."""
    worlds_rows = [measure(names, world, sizes, width, settings, add) for world in worlds]
    return [row for rows in worlds_rows for row in rows]


def measure(
    names: Sequence[str],
    world: int,
    sizes: Sequence[int],
    width: int,
    settings: CollectiveSettings,
    add: Callable[[list[CollectiveRow]], None] = lambda rows: None,
) -> list[CollectiveRow]:
    """Start `world` processes that measure all losses at all sizes; `add` receives each one's rows.

    Raises:
        ValueError: there are not as many GPUs.
    """
    if settings.device == "cuda" and torch.cuda.device_count() < world:
        raise CannotRunHere(
            f"--ranks {world} with {torch.cuda.device_count()} GPUs; lower it, or take --device cpu"
        )
    threads = max(torch.get_num_threads() // world, 1)
    with tempfile.TemporaryDirectory(prefix="fastclip-bench-") as folder:
        arguments = (world, tuple(names), tuple(sizes), width, settings, threads, folder)
        processes: Any = torch.multiprocessing.spawn(
            _work, arguments, nprocs=world, join=False, daemon=True
        )
        rows: list[CollectiveRow] = []
        over, taken = False, 0
        try:
            while not over:
                over = processes.join(timeout=0.5)
                for file in sorted(Path(folder).glob("*.pt"))[taken:]:
                    found = [CollectiveRow(**row) for row in torch.load(file, weights_only=True)]
                    rows += found
                    add(found)
                    taken += 1
        finally:
            for process in processes.processes:
                process.kill()
    return rows


@contextmanager
def traffic() -> Iterator[list[int]]:
    """Bytes that this process receives inside, a number for each exchange.

    Seen at the functions of torch.distributed that the losses call. Own parts do not count: of
    `all_to_all_single` the callers have to leave them out, as fastclip does.
    """
    seen: list[int] = []
    world, rank = dist.get_world_size(), dist.get_rank()

    def received(name: str, *given: Any) -> int:
        if name == "batch_isend_irecv":
            return sum(op.tensor.nbytes for op in given[0] if op.op is dist.irecv)
        if name == "all_gather":
            return sum(t.nbytes for t in given[0]) - given[1].nbytes
        if name == "all_reduce":
            return round(2 * (1 - 1 / world) * given[0].nbytes)
        if name == "scatter":
            return given[0].nbytes * (given[2] != rank)
        if name == "reduce_scatter":
            return given[0].nbytes * (world - 1)
        # one tensor out, one in
        own = given[1].nbytes if name.startswith("all_gather") else 0
        return given[0].nbytes - own

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            seen.append(received(name, *given))
            return original(*given, **options)

        return call

    originals = {name: getattr(dist, name) for name in _EXCHANGES if hasattr(dist, name)}
    for name, original in originals.items():
        setattr(dist, name, watch(name, original))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


_EXCHANGES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "batch_isend_irecv",
    "reduce_scatter",
    "scatter",
)


def _work(
    rank: int,
    world: int,
    names: Sequence[str],
    sizes: Sequence[int],
    width: int,
    settings: CollectiveSettings,
    threads: int,
    folder: str,
) -> None:
    # Ctrl-C reaches all processes of a terminal; the first ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_gpu = settings.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)
    # open_clip calls functions that torch is about to rename, once a line and process
    warnings.filterwarnings("ignore", "torch.distributed.nn", FutureWarning)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
    for number, (name, n) in enumerate(itertools.product(names, sizes)):
        rows = _measure(name, n, width, settings, device)
        if rank == 0:
            # whole under its name at once: the first process is waiting for it
            file = Path(folder, f"{number:04d}")
            torch.save([asdict(row) for row in rows], file)
            file.rename(file.with_suffix(".pt"))
    # nobody leaves while another is still in its last exchange
    dist.barrier()
    dist.destroy_process_group()


def _measure(
    name: str, n: int, width: int, settings: CollectiveSettings, device: torch.device
) -> list[CollectiveRow]:
    rank, world = dist.get_rank(), dist.get_world_size()
    # 0-d tensors: gradients of scales travel too
    scalars = [settings.scale, *([-10.0] if name == "siglip" else [])]
    whole = [*clustered(2, world * n, width), *map(torch.tensor, scalars)]
    exact = _exact(OPERATORS[name], whole)[:n] * world if rank == 0 else None
    inputs = [
        (t[rank * n :][:n] if t.ndim else t).to(device).detach().requires_grad_() for t in whole
    ]
    rows, runs = [], {}
    for baseline, build in implementations(name, rank, world).items():
        row = CollectiveRow(name, baseline, world, n, width)
        rows.append(row)
        try:
            loss = build()
        except ImportError as error:
            row.status = status_of(error)
            continue
        with traffic() as seen:
            gradient = torch.autograd.grad(loss(*inputs), inputs)[0]
        row.received_bytes = sum(seen)
        row.saved_bytes = saved_bytes(loss, inputs)
        if exact is not None:
            row.error = relative(gradient.cpu(), exact)
        runs[baseline] = loss
    seconds: dict[str, list[float]] = {baseline: [] for baseline in runs}
    for turn in range(settings.warmup + settings.rounds):
        for baseline, loss in runs.items():
            elapsed = _timed(loss, inputs, device)
            if turn >= settings.warmup:
                seconds[baseline].append(elapsed)
    first = quantile(seconds[rows[0].baseline], 0.5)
    for row in rows:
        if row.baseline in seconds:
            found = seconds[row.baseline]
            row.p20, row.p50, row.p80 = (quantile(found, q) for q in (0.2, 0.5, 0.8))
            row.ratio = row.p50 / first
    return rows


def _exact(loss: Loss, whole: Inputs) -> Tensor:
    """dX of one process over all pairs, in float64."""
    wide = [t.double().requires_grad_() for t in whole]
    return torch.autograd.grad(loss(*wide, backend="torch"), wide[0])[0]


def _timed(loss: Loss, inputs: Inputs, device: torch.device) -> float:
    """Seconds of the slowest process, all having begun together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    torch.autograd.grad(loss(*inputs), inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item()
