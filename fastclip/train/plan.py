"""One setting for training at a global batch on so many GPUs: the cheapest that fits.

Counts, no times: formulas (`costs.py`) of sizes and of a model's counted footprint
(`footprint.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastclip.device import AUTOCAST_DTYPES
from fastclip.train import costs
from fastclip.train.costs import ENGINES, EXCHANGES, LossBytes
from fastclip.train.footprint import Footprint

# The rest is left to the CUDA context, the libraries' workspaces and the allocator's gaps.
USABLE = 0.92
# Smaller ones are taken only where nothing else fits.
LEAST_MICRO_BATCH = 16


@dataclass(frozen=True)
class Request:
    """What is asked for; the fields are the options of `fastclip plan`."""

    gpus: int
    batch: int
    memory: float = 80.0
    precision: str = "amp_bf16"
    engine: str = "auto"
    loss: str = "clip"
    dist: str = "auto"

    @property
    def rows(self) -> int:
        """Samples of a rank and step."""
        return self.batch // self.gpus

    @property
    def feature_bytes(self) -> int:
        """Bytes of a feature inside the loss, which casts to autocast's dtype."""
        dtype = AUTOCAST_DTYPES[self.precision]
        return 4 if dtype is None else dtype.itemsize

    @property
    def usable(self) -> int:
        """Bytes of a GPU that a plan may fill."""
        return int(self.memory * USABLE * 2**30)


@dataclass(frozen=True)
class Part:
    """Bytes of one thing while the loss runs and while the towers' backward does."""

    name: str
    in_loss: int
    in_towers: int


@dataclass(frozen=True)
class Plan:
    """A request, one setting for it, and what it costs each rank."""

    request: Request
    footprint: Footprint
    engine: str
    dist: str
    micro_batch: int
    checkpointing: bool

    @property
    def micro_batches(self) -> int:
        """k, open_clip's --accum-freq."""
        return self.request.rows // self.micro_batch

    @property
    def parts(self) -> list[Part]:
        """The memory by part."""
        request, model = self.request, self.footprint
        n, m, W = request.rows, self.micro_batch, request.gpus
        sizes = model.parameters, W, request.precision
        states = costs.state_memory(self.engine, *sizes, model.sharding)
        parts = [Part(name, size, size) for name, size in states.items()]
        if self.engine == "torch":
            parts.append(Part("cast weights", model.cast_bytes, model.cast_bytes))
        saved = model.saved[self.checkpointing](m)
        # under accumulation the loss runs on stored features, while no activation is alive
        one_pass = self.micro_batches == 1
        parts.append(Part("activations", saved if one_pass else 0, saved))
        parts.append(Part("their backward", 0, model.working[self.checkpointing](m)))
        stored = 0 if one_pass else 2 * 2 * n * model.width * 4
        parts.append(Part("stored features", stored, stored))
        size = request.feature_bytes
        loss = costs.loss_memory(request.loss, self.dist, n, W, model.width, size)
        parts.append(Part("loss", sum(loss.values()), 0))
        return parts

    @property
    def memory(self) -> int:
        """Bytes of a GPU at the greater of the two moments."""
        parts = self.parts
        return max(sum(p.in_loss for p in parts), sum(p.in_towers for p in parts))

    @property
    def fits(self) -> bool:
        """Whether it does, with the reserve left free."""
        return self.memory <= self.request.usable

    @property
    def tower_flop(self) -> int:
        """FLOP of a rank's towers in a step."""
        return costs.tower_flop(
            self.footprint.forward_flop,
            self.request.rows,
            accumulating=self.micro_batches > 1,
            checkpointing=self.checkpointing,
        )

    @property
    def loss_flop(self) -> int:
        """FLOP of a rank's loss in a step."""
        request = self.request
        asked = request.loss, self.dist, request.rows, request.gpus
        kept = costs.kept_bytes(*asked, request.feature_bytes) > 0
        width = self.footprint.width
        return costs.loss_flop(request.loss, request.rows, request.gpus, width, kept=kept)

    @property
    def loss_bytes(self) -> LossBytes:
        """Bytes a rank receives in a step for the loss."""
        request, width = self.request, self.footprint.width
        return costs.bytes_per_rank(
            request.loss, self.dist, request.rows, request.gpus, width, request.feature_bytes
        )

    @property
    def reduction_bytes(self) -> int:
        """Bytes a rank receives in a step for parameters and their gradients."""
        size = 4 if AUTOCAST_DTYPES[self.request.precision] is None else 2
        parameters, ranks = self.footprint.parameters, self.request.gpus
        return costs.reduction_bytes(self.engine, parameters, ranks, self.micro_batches, size)


def choose(footprint: Footprint, request: Request, *, one_pass: bool = False) -> Plan | None:
    """The cheapest setting that fits, or None; the batch must be a multiple of the GPUs.

    Settings are tried in this order, and the first that fits is taken: fewest extra forward passes
    of the towers (none; one, by checkpointing or by accumulation; both), then the lower ZeRO stage,
    FSDP2 being the last, then gather before ring, then checkpointing before accumulation, which
    reads the inputs twice. Under accumulation the micro-batch is the largest divisor of a rank's
    rows that fits. All are tried with micro-batches of at least `LEAST_MICRO_BATCH` first.

    Args:
        one_pass: without accumulation.
    """
    for least in sorted({min(LEAST_MICRO_BATCH, request.rows), 1}, reverse=True):
        sizes = [m for m in divisors(request.rows) if m >= least][::-1]
        for plan in settings(footprint, request, sizes[:1] if one_pass else sizes):
            if plan.fits:
                return plan
    return None


def settings(footprint: Footprint, request: Request, sizes: list[int]) -> Iterator[Plan]:
    """All settings with micro-batches of these sizes, in the order of `choose`."""
    whole = [m for m in sizes if m == request.rows]
    parts = [] if footprint.has_batch_norm else [m for m in sizes if m < request.rows]
    alone = request.gpus == 1
    engines = ENGINES if request.engine == "auto" else (request.engine,)
    exchanges = EXCHANGES if request.dist == "auto" else (request.dist,)
    for options in (((False, whole),), ((True, whole), (False, parts)), ((True, parts),)):
        for engine in engines[:1] if alone else engines:
            for exchange in exchanges[:1] if alone else exchanges:
                for checkpointing, micro_batches in options:
                    for m in micro_batches:
                        yield Plan(request, footprint, engine, exchange, m, checkpointing)


def largest_batch(footprint: Footprint, request: Request, *, one_pass: bool = False) -> int:
    """The largest global batch at this number of GPUs; 0 if not one sample a GPU fits.

    Args:
        one_pass: without accumulation. With it, micro-batches of `LEAST_MICRO_BATCH` are taken.
    """
    one_pass = one_pass or footprint.has_batch_norm

    def fits(rows: int) -> bool:
        asked = replace(request, batch=rows * request.gpus)
        sizes = [rows if one_pass else min(rows, LEAST_MICRO_BATCH)]
        return any(plan.fits for plan in settings(footprint, asked, sizes))

    unit = LEAST_MICRO_BATCH if not one_pass and fits(LEAST_MICRO_BATCH) else 1
    low, high = 0, 1
    while fits(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit * request.gpus


def fewest_gpus(footprint: Footprint, request: Request, *, one_pass: bool = False) -> int | None:
    """The smallest number of GPUs that divides the batch and fits it; None if none does."""
    for gpus in divisors(request.batch):
        if choose(footprint, replace(request, gpus=gpus), one_pass=one_pass) is not None:
            return gpus
    return None


def reasons(plan: Plan) -> list[str]:
    """What was tried before this setting and does not fit: the least memory of each kind."""
    larger = [m for m in divisors(plan.request.rows) if m > plan.micro_batch]
    sizes = [m for m in divisors(plan.request.rows) if m >= plan.micro_batch][::-1]
    refused: dict[str, Plan] = {}
    for other in settings(plan.footprint, plan.request, sizes):
        if other == plan:
            break
        if other.micro_batches == 1:
            kind = "one pass"
        elif other.micro_batch == plan.micro_batch:
            kind = f"a micro-batch of {other.micro_batch:,}, tried before this setting,"
        elif other.micro_batch == larger[0]:
            kind = f"the next larger micro-batch, {other.micro_batch:,},"
        else:
            continue
        kind += " with checkpointing" if other.checkpointing else ""
        refused[kind] = min(refused.get(kind, other), other, key=lambda plan: plan.memory)
    lines = [
        f"{kind} needs {gib(best.memory)} GiB at the least ({best.engine}"
        + ("" if plan.request.gpus == 1 else f", {best.dist}")
        + ")"
        for kind, best in refused.items()
    ]
    return [f"{gib(plan.request.usable)} GiB are filled at most, {USABLE:.0%} of a GPU", *lines]


def easier_batch(plan: Plan) -> int | None:
    """A batch near this one that lets the micro-batch be at least twice as large; or None."""
    if plan.micro_batches == 1:
        return None
    request, size, found = plan.request, 1, None
    while 2 * size <= request.rows:
        size *= 2
        batch = max(round(request.rows / size), 1) * size * request.gpus
        asked = replace(request, batch=batch)
        if not replace(plan, request=asked, micro_batch=size).fits:
            break
        found = (size, batch)
    return found[1] if found and found[0] >= 2 * plan.micro_batch else None


def describe(plan: Plan) -> str:
    """The setting in a few words."""
    names = {"torch": "DDP", "fsdp": "FSDP2"}
    words = [names.get(plan.engine, f"ZeRO-{plan.engine[-1]}")]
    if plan.request.gpus == 1:
        words = ["one process"]
    words.append(f"{plan.micro_batches:,} x {plan.micro_batch:,}")
    if plan.checkpointing:
        words.append("checkpointing")
    return ", ".join(words if plan.request.gpus == 1 else [*words, plan.dist])


def scaling_table(
    footprint: Footprint,
    gpus: tuple[int, ...] = (1, 8, 64, 256, 1024),
    batches: tuple[int, ...] = (2**15, 2**18, 2**20, 2**22),
) -> str:
    """Markdown: memory and bytes of the loss by gather and ring, and the setting to take."""
    lines = [
        "| GPUs | global batch | loss, GiB: gather; ring | received for the loss, MB: gather; ring "
        "(open_clip) | setting | GiB of 80 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    width = footprint.width
    for W in gpus:
        for batch in batches:
            n = batch // W
            memory = [
                sum(costs.loss_memory("clip", exchange, n, W, width, 2).values())
                for exchange in EXCHANGES
            ]
            received = [
                costs.bytes_per_rank(loss, exchange, n, W, width, 2).total / 1e6
                for loss, exchange in (
                    ("clip", "gather"),
                    ("clip", "ring"),
                    ("open_clip", "gather"),
                )
            ]
            cells = [
                f"{W:,}",
                f"{batch:,}",
                "; ".join(gib(m) for m in memory[: 1 if W == 1 else 2]),
            ]
            cells.append("{:,.0f}; {:,.0f} ({:,.0f})".format(*received) if W > 1 else "0")
            plan = choose(footprint, Request(W, batch))
            cells += [describe(plan), gib(plan.memory)] if plan else ["does not fit", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gib(count: int) -> str:
    """Bytes in GiB, one decimal."""
    return f"{count / 2**30:,.1f}"


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
