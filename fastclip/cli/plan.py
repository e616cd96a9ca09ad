"""`fastclip plan`: one setting for a global batch on so many GPUs, and what it costs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Literal

from fastclip.command_line import parse_flags
from fastclip.messages import counted, filled, logger
from fastclip.train.plan import (
    Plan,
    Request,
    choose,
    easier_batch,
    fewest_gpus,
    gib,
    largest_batch,
    reasons,
)

_WIDTH = 80
# what machines for training have, in most clouds
_GPUS_OF_A_NODE = 8
ENGINE_WORDS = {
    "torch": "torch: one process, or data-parallel ones",
    "zero1": "DeepSpeed, ZeRO stage 1: Adam's state divided over the GPUs",
    "zero2": "DeepSpeed, ZeRO stage 2: Adam's state and gradients divided",
    "zero3": "DeepSpeed, ZeRO stage 3: Adam's state, gradients, parameters divided",
    "fsdp": "FSDP2: Adam's state, gradients, parameters divided, by blocks",
}

ZERO = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class PlanConfig:
    """Choose settings for training at a global batch, compute their cost, and print the command.

    Bytes and FLOP are computed, not measured: neither a GPU nor data is needed.
    """

    gpus: int
    """Number of GPUs, with one process each."""
    batch: int
    """Global batch: samples of all GPUs that a step compares with each other."""
    model: str = "ViT-B-16"
    """An open_clip model, a config shipped with fastclip, or a path to a JSON config."""
    memory: float = 80.0
    """Memory of a GPU in GiB, of which 92 % is used."""
    precision: Literal["amp_bf16", "fp32", "amp"] = "amp_bf16"
    """Precision of the towers and dtype of the features in the loss."""
    engine: Literal["auto", "torch", "zero1", "zero2", "zero3", "fsdp"] = "auto"
    """torch, a ZeRO stage of DeepSpeed, or FSDP2."""
    loss: Literal["clip", "siglip"] = "clip"
    """Loss."""
    dist: Literal["auto", "gather", "ring"] = "auto"
    """How ranks exchange features: all at once (gather), or block by block (ring)."""


def main(arguments: Sequence[str]) -> int:
    """Print a plan; status 1 if the request cannot be met, and the nearest that can is printed."""
    from fastclip.train.footprint import footprint

    config = parse_flags(PlanConfig, arguments, "fastclip plan")
    if config.gpus < 1 or config.batch < 1 or config.memory <= 0:
        raise ValueError("--gpus, --batch and --memory must be positive")
    request = Request(**{field.name: getattr(config, field.name) for field in fields(Request)})
    model = footprint(config.model, config.precision)
    wrong = request.batch % request.gpus != 0
    if wrong:
        lower = request.batch // request.gpus * request.gpus
        nearest = [b for b in (lower, lower + request.gpus) if b]
        _say(
            f"--batch {request.batch} is not a multiple of --gpus {request.gpus}; use "
            + " or ".join(map(str, nearest))
        )
        request = replace(request, batch=min(nearest, key=lambda b: abs(b - config.batch)))
    plan = choose(model, request)
    if plan is None:
        wrong = True
        batch, gpus = largest_batch(model, request), fewest_gpus(model, request)
        remedy = f"the largest batch that fits them is {batch:,}" if batch else ""
        more = f"the batch fits {gpus:,} GPUs" if gpus else ""
        _say(
            f"a global batch of {request.batch:,} does not fit {request.gpus:,} GPUs of "
            f"{request.memory:g} GiB; " + ("; ".join(filter(None, (remedy, more))) or "none does")
        )
        if batch:
            plan = choose(model, replace(request, batch=batch))
        elif gpus:
            plan = choose(model, replace(request, gpus=gpus))
    if plan is not None:
        print("\n".join(report(plan, config.model)))
    return 1 if wrong else 0


def report(plan: Plan, model: str) -> list[str]:
    """The lines of a plan."""
    request, footprint = plan.request, plan.footprint
    k, alone = plan.micro_batches, request.gpus == 1
    typed = _broken(command(plan, model))
    lines = [
        f"{model} (computed, not measured)",
        f"global batch {request.batch:,} on {request.gpus:,} x {request.memory:g} GiB: "
        f"{counted(request.rows, 'sample')} a GPU",
        "",
        "setting",
        f"  engine         {ENGINE_WORDS[plan.engine]}",
        f"  micro-batch    {counted(plan.micro_batch, 'sample')}, {k:,} a step"
        + (": exact accumulation, towers run forward twice" if k > 1 else ""),
        f"  checkpointing  {'on' if plan.checkpointing else 'off'}",
        f"  loss           {request.loss}" + ("" if alone else f', dist="{plan.dist}"'),
        "",
        f"command{_where(request.gpus)}",
        *typed,
        "",
        "why",
        *(f"  {reason}" for reason in reasons(plan)),
    ]
    batch = easier_batch(plan)
    if batch is not None:
        lines.append(f"  {request.rows:,} has no larger divisor that fits; see --batch {batch}")
    lines += ["", f"{'memory per GPU, GiB':28} in the loss  in the towers' backward"]
    parts = [part for part in plan.parts if part.in_loss or part.in_towers]
    for part in parts:
        lines.append(f"  {part.name:26} {gib(part.in_loss):>11}  {gib(part.in_towers):>23}")
    loss, towers = sum(p.in_loss for p in parts), sum(p.in_towers for p in parts)
    lines.append(f"  {'total':26} {gib(loss):>11}  {gib(towers):>23}")
    if k > 1:
        host = request.rows * footprint.input_bytes
        lines.append(f"  and {gib(host)} GiB of inputs a step and rank on the host")
    received = plan.loss_bytes
    lines += [
        "",
        "received per rank and step, MB",
        f"  features                   {_mega(received.features + received.features_again):>11}",
        f"  their gradients            {_mega(received.gradient_partials):>11}",
        "  columns' statistics        "
        f"{_mega(received.column_statistics + received.column_gradients):>11}",
        f"  parameters, gradients      {_mega(plan.reduction_bytes):>11}",
        "",
        "TFLOP per rank and step",
        f"  towers                     {plan.tower_flop / 1e12:>11,.1f}",
        f"  loss                       {plan.loss_flop / 1e12:>11,.1f}",
        "",
        "where it stops fitting",
    ]
    for words, one_pass in (("with accumulation", False), ("in one pass", True)):
        if one_pass or not footprint.has_batch_norm:
            most = largest_batch(footprint, request, one_pass=one_pass)
            fewest = fewest_gpus(footprint, request, one_pass=one_pass)
            lines.append(
                f"  {words:18} largest batch on {counted(request.gpus, 'GPU')}: {most:,}; "
                f"fewest GPUs: {'none' if fewest is None else f'{fewest:,}'}"
            )
    if footprint.has_batch_norm:
        lines.append("  the model has batch normalization: no accumulation")
    filled_lines = ([line] if line in typed else filled("", line, 4).split("\n") for line in lines)
    return list(chain.from_iterable(filled_lines))


def command(plan: Plan, model: str) -> list[str]:
    """The words that start training so: the launcher's, then the trainer's."""
    request = plan.request
    words = [*_launcher(plan), "train", "--train-data", "DATA", "--model", model]
    words += ["--batch-size", str(plan.micro_batch), "--accum-freq", str(plan.micro_batches)]
    words += ["--precision", request.precision]
    words += ["--grad-checkpointing"] * plan.checkpointing
    words += ["--siglip"] * (request.loss == "siglip")
    words += ["--loss-dist-impl", "ring"] * (plan.dist == "ring" and request.gpus > 1)
    words += ["--fsdp"] * (plan.engine == "fsdp")
    if plan.engine in ZERO:
        words += ["--deepspeed", "--deepspeed_config", f"ds_{plan.engine}"]
    return words


def _launcher(plan: Plan) -> list[str]:
    gpus, nodes = plan.request.gpus, _nodes(plan.request.gpus)
    if plan.engine in ZERO:
        where = ["--num_gpus", str(gpus)] if nodes == 1 else ["--hostfile", "HOSTFILE"]
        return ["deepspeed", *where, "--module", "fastclip.cli"]
    if gpus == 1:
        return ["fastclip"]
    more = ["--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", "NODE:29500"]
    each = ["--nproc_per_node", str(gpus // nodes)]
    return ["torchrun", *each, *more * (nodes > 1), "-m", "--", "fastclip.cli"]


def _nodes(gpus: int) -> int:
    """Machines with the same number of GPUs each, 8 at most."""
    return gpus // max(each for each in range(1, _GPUS_OF_A_NODE + 1) if gpus % each == 0)


def _where(gpus: int) -> str:
    nodes = _nodes(gpus)
    return (
        "" if nodes == 1 else f", on each of {nodes:,} nodes with {counted(gpus // nodes, 'GPU')}"
    )


def _broken(words: Sequence[str]) -> list[str]:
    """A command in lines for a shell, flags beside their values."""
    parts: list[str] = []
    for word in map(shlex.quote, words):
        # a value stands with its flag
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and word[0] != "-":
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return lines


def _mega(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _say(sentence: str) -> None:
    logger.error(f"fastclip plan: {sentence}")
