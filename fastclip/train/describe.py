"""What a run says of itself at its start: in its directory, and in its messages."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastclip.atomic import write_folder, write_text
from fastclip.device import AUTOCAST_DTYPES, has_bf16_product
from fastclip.messages import counted, logger, note
from fastclip.models.build import describe
from fastclip.models.clip import CONFIG_FILE, Model
from fastclip.ops.backend import explain
from fastclip.train.best import best_metric
from fastclip.train.config import TrainConfig, to_yaml
from fastclip.train.distributed import World
from fastclip.train.inherited import SETTINGS_FILE
from fastclip.train.optim import cooldown_steps, warmup_steps
from fastclip.train.options import OptimOptions
from fastclip.train.state import TrainState
from fastclip.train.summary import labeled


def write_description(
    run: Path, config: TrainConfig, model: Model, classes: Sequence[str] = ()
) -> None:
    """Write the model's description and the resolved configuration into the run directory."""
    description = json.dumps(describe(config.model.model, model, config.model, classes), indent=2)
    write_text(run / CONFIG_FILE, description + "\n")
    write_text(run / SETTINGS_FILE, to_yaml(config))
    # a tokenizer from elsewhere must be at hand when the run is loaded
    if save := getattr(model.tokenizer, "save_pretrained", None):
        write_folder(run, lambda made: save(str(made)))


def announce(state: TrainState) -> None:
    """Log what is trained, on what and how; the whole configuration is in the run directory."""
    logger.info("\n".join(header(state)))
    warn_of_batch(state.config.optim, state.world.size)
    warn_of_precision(state.config.model.precision, state.world.device)


def warn_of_precision(precision: str, device: torch.device) -> None:
    """Say that bf16 is asked of a device that lacks it."""
    if precision != "amp_bf16" or has_bf16_product(device):
        return
    what, other = ("processor", "fp32") if device.type == "cpu" else ("GPU", "amp")
    note(f"this {what} emulates bf16, which is slow; --precision {other} is faster")


def warn_of_batch(optim: OptimOptions, processes: int) -> None:
    """Say that a run has another global batch than its settings are meant for."""
    samples, meant = optim.step_samples(processes), optim.global_batch
    if meant is None or samples == meant:
        return
    each, left = divmod(meant, optim.batch_size * optim.accum_freq)
    start = "" if left else f"start {counted(each, 'process', 'processes')}, "
    note(
        f"the settings are meant for {counted(meant, 'sample')} a step, this run has {samples:,}; "
        f"{start}change --batch-size or --accum-freq, or choose --lr and --warmup for this batch"
    )


def header(state: TrainState) -> list[str]:
    """The lines of it, before the first step or before those that a checkpoint has left."""
    config, world, loader = state.config, state.world, state.loader
    optim, data = config.optim, config.data
    samples, total = state.step_samples, state.total_steps
    used = loader.steps_per_epoch * samples
    # sharded parameters are empty here, and know how large they are
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in state.model.model.parameters())
    processes = f" x {world.size} processes" if world.size > 1 else ""
    micro = f" x {optim.accum_freq} micro-batches" if optim.accum_freq > 1 else ""
    parts = f" = {optim.batch_size}{micro}{processes}" if micro or processes else ""
    count = data.loader_processes
    loaders = (
        counted(count, "loader process", "loader processes") if count else "loaded in this process"
    )
    left_over = loader.epoch_samples - used
    fill = "fills" if left_over == 1 else "fill"
    dropped = f" ({counted(left_over, 'sample')} an epoch {fill} no step)" if left_over else ""
    continued = f", {state.step:,} of them made" if state.step else ""
    # as with another batch size or other data before
    continued += " with other settings" if state.last_step != total else ""
    warmup = f"{counted(warmup_steps(optim, total), 'step')} of warm-up"
    if optim.warmup >= total:
        warmup += f" (a tenth of the run, which --warmup {optim.warmup} would outlast)"
    loss = _name_of_loss(config)
    # a classifier's is torch's own
    if config.model.objective != "classify":
        loss += f", computed by {_implementation(config, world)}"
    lines = {
        "run": f"{state.folder} (config.yaml has every setting)",
        "data": f"{data.train_data}, {counted(loader.epoch_samples, 'sample')} an epoch, {loaders}",
        "model": f"{config.model.model}, {parameters / 1e6:.1f} M parameters, "
        f"{config.model.precision} on {world.device}",
        "loss": loss,
        "step": f"{counted(samples, 'sample')}{parts}",
        "length": f"{counted(optim.epochs, 'epoch')} of {counted(loader.steps_per_epoch, 'step')}"
        f"{dropped}, {counted(state.last_step, 'step')} in all{continued}",
        "rate": f"{optim.lr:g} after {warmup}, then {optim.lr_scheduler}{_cooldown(optim, total)}",
        "saves": _kept(config),
    }
    return [line for name, text in lines.items() for line in labeled(name, text)]


def _cooldown(optim: OptimOptions, total: int) -> str:
    steps = cooldown_steps(optim, total)
    return f", the last {steps:,} steps down to {optim.lr_cooldown_end:g}" if steps else ""


def _kept(config: TrainConfig) -> str:
    """Which epochs' checkpoints."""
    options = config.checkpoint
    if options.save_all:
        return "every epoch's checkpoint"
    if options.delete_previous_checkpoint or not _chooses(config):
        return "the newest epoch's checkpoint (--save-all: every epoch's)"
    return f"the newest epoch and the best by {best_metric(config)} (--save-all: every epoch)"


def _chooses(config: TrainConfig) -> bool:
    """Whether the evaluation has the metric that finds the best epoch."""
    return bool(config.checkpoint.best_metric or config.data.val_data)


def _name_of_loss(config: TrainConfig) -> str:
    if config.loss.loss != "objective":
        return f"{config.loss.loss} ({config.loss.global_variant})"
    if config.model.objective == "clip" and config.loss.siglip:
        return "siglip"
    if config.loss.distills:
        stored = " and ".join(config.loss.distill_embeddings or ())
        return f"clip, distilled from {config.loss.distill_model or stored or 'the shards'}"
    return config.model.objective


def _implementation(config: TrainConfig, world: World) -> str:
    """The one that computes the loss, and why a faster one does not."""
    dtype = AUTOCAST_DTYPES[config.model.precision] or torch.float32
    wanted = config.loss.loss_backend
    if wanted != "auto":
        return f"{wanted} (--loss-backend)"
    chosen, missing = "", ""
    rows = explain("sigmoid" if config.loss.siglip else "similarity", world.device, dtype)
    for name, status, _ in rows:
        if status == "used":
            chosen = name
            break
        # on a CPU a GPU's kernels are not missed
        if status.startswith("not available") and (name == "cpp") == (world.device.type == "cpu"):
            missing += f"; {name} is {status}"
    return chosen + missing
