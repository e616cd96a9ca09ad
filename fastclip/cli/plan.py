"""`fastclip plan`: one setting for a global batch on so many GPUs, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from fastclip.command_line import parse_flags
from fastclip.messages import logger
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

ENGINE_WORDS = {
    "torch": "torch: one process, or data-parallel ones",
    "zero1": "DeepSpeed, ZeRO stage 1: Adam's state divided by the GPUs",
    "zero2": "DeepSpeed, ZeRO stage 2: Adam's state and gradients divided by the GPUs",
    "zero3": "DeepSpeed, ZeRO stage 3: Adam's state, gradients and parameters divided by the GPUs",
}


@dataclass(frozen=True)
class PlanConfig:
    """Choose settings for training at a global batch, and compute their cost.

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
    engine: Literal["auto", "torch", "zero1", "zero2", "zero3"] = "auto"
    """torch, or a ZeRO stage of DeepSpeed."""
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
            f"--batch {request.batch:,} is not a multiple of --gpus {request.gpus:,}; use "
            + " or ".join(f"{batch:,}" for batch in nearest)
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
    flags = f"--batch-size {plan.micro_batch} --accum-freq {k} --precision {request.precision}"
    flags += " --grad-checkpointing" if plan.checkpointing else ""
    flags += " --siglip" if request.loss == "siglip" else ""
    flags += " --loss-dist-impl ring" if plan.dist == "ring" and not alone else ""
    if plan.engine != "torch":
        flags += f" --deepspeed --deepspeed_config ds_{plan.engine}"
    lines = [
        f"{model}, global batch {request.batch:,} on {request.gpus:,} x {request.memory:g} GiB: "
        f"{request.rows:,} samples a GPU (computed, not measured)",
        "",
        "setting",
        f"  engine         {ENGINE_WORDS[plan.engine]}",
        f"  micro-batch    {plan.micro_batch:,} samples, {k:,} a step"
        + (": exact accumulation, towers run forward twice" if k > 1 else ""),
        f"  checkpointing  {'on' if plan.checkpointing else 'off'}",
        f"  loss           {request.loss}" + ("" if alone else f', dist="{plan.dist}"'),
        f"  flags          {flags}",
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
                f"  {words:18} largest batch on {request.gpus:,} GPUs: {most:,}; fewest GPUs for "
                f"{request.batch:,}: {'none' if fewest is None else f'{fewest:,}'}"
            )
    if footprint.has_batch_norm:
        lines.append("  the model has batch normalization: no accumulation")
    return lines


def _mega(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _say(sentence: str) -> None:
    logger.error(f"fastclip plan: {sentence}")
