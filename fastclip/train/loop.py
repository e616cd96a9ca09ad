"""The training loop, top to bottom."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastclip.data.loader import FaultLog
from fastclip.device import choose_device
from fastclip.losses.clip import ClipLoss
from fastclip.models import checkpoint
from fastclip.models.clip import create
from fastclip.train import state
from fastclip.train.config import TrainConfig
from fastclip.train.health import NonFiniteError, first_non_finite
from fastclip.train.log import RunLog, plot_loss
from fastclip.train.optim import build_optimizer, clamp_logit_scale, learning_rate
from fastclip.train.setup import (
    announce,
    build_loader,
    load_weights,
    named,
    read_resumed,
    write_description,
)
from fastclip.train.validate import Validator


def train(config: TrainConfig) -> Path:
    """Train from a configuration; returns the run's folder.

    Raises:
        FileExistsError: the run's folder exists and --resume is not given.
        NonFiniteError: a step's loss or gradient is not finite; nothing of it was applied.
        ValueError, FileNotFoundError: the configuration or the data cannot be used.
    """
    config = named(config)
    device = choose_device(config.device)
    run = Path(config.logs) / str(config.name)
    resumed = read_resumed(config, run)

    state.seed_rng(config.seed)
    model = create(config.model, device)
    # convolutions are fastest with channels innermost, and nothing else minds
    model.model.to(memory_format=torch.channels_last)
    loader = build_loader(config, model, device)
    validator = Validator(config, model) if config.val_data else None
    optimizer = build_optimizer(model.model, config)
    step = epoch = step_in_epoch = 0
    if resumed is not None:
        load_weights(model.model, resumed["state_dict"], config.model)
        optimizer.load_state_dict(resumed["optimizer"])
        step, epoch = resumed["step"], resumed["data"]["epoch"]
        step_in_epoch = resumed["data"]["position"] // config.batch_size

    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_description(run, config, model)
    log = RunLog(
        run, step, tensorboard=config.report_to == "tensorboard", sample_ids=config.log_sample_ids
    )
    faults = FaultLog()
    total_steps = config.epochs * loader.steps_per_epoch
    announce(config, device, model.model, loader, step)

    parameters = list(model.model.parameters())
    towers = torch.compile(model.model) if config.torchcompile else model.model
    normalise = _Normalise(model.preprocess_config, device)
    loss_function = ClipLoss(label_smoothing=config.label_smoothing, backend=config.loss_backend)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "amp_bf16")
    if resumed is not None:
        # last, so that nothing of the set-up draws from the restored streams
        state.restore_rng(resumed["rng"])

    def save(name: str) -> None:
        position = {"epoch": epoch, "step_in_epoch": step_in_epoch, "step": step}
        content = state.capture(model.model, optimizer, config, **position)
        checkpoint.write(checkpoints / name, content)

    bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    meter = _Meter(config.batch_size)
    try:
        while epoch < config.epochs:
            model.model.train()
            for batch in meter.waiting(loader.batches(epoch, step_in_epoch)):
                for fault in faults.add(batch["faults"]):
                    bar.write(f"skipped {fault}", file=sys.stderr)
                images = normalise(batch["image"])
                texts = batch["text"].to(device, non_blocking=True)

                def forward(images: Tensor = images, texts: Tensor = texts) -> dict[str, Any]:
                    with autocast:
                        output = towers(images, texts)
                        features = output["image_features"], output["text_features"]
                        return {**output, "loss": loss_function(*features, output["logit_scale"])}

                loss = forward()["loss"]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = nn.utils.get_total_norm(gradients)
                if not (torch.isfinite(loss) and torch.isfinite(norm)):
                    inputs = {"image": images, "text": texts}
                    culprit = first_non_finite(model.model, inputs, forward)
                    raise NonFiniteError(
                        f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}; first "
                        f"non-finite tensor: {culprit}. No parameter was changed, nothing was "
                        f"saved after {checkpoints}. The step's samples: {batch['key'][:4]}..."
                    )
                if config.grad_clip_norm is not None:
                    nn.utils.clip_grads_with_norm_(parameters, config.grad_clip_norm, norm)
                rate = learning_rate(config, step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                clamp_logit_scale(model.model)

                step += 1
                step_in_epoch += 1
                bar.update()
                log.samples(step, batch["key"])
                meter.step()
                if step % config.log_every_n_steps == 0 or step == total_steps:
                    values = {
                        "loss": loss.item(),
                        "grad_norm": norm.item(),
                        "lr": rate,
                        "logit_scale": model.model.get_parameter("logit_scale").exp().item(),
                        "epoch": epoch + step_in_epoch / loader.steps_per_epoch,
                        **meter.read(device),
                    }
                    log.metrics(step, values)
                    bar.set_postfix_str(_postfix(values))
                    if bar.disable:
                        # no terminal: lines for a log file instead of a bar
                        print(f"step {step}/{total_steps}  {_postfix(values)}", file=sys.stderr)
                if config.save_every_steps and step % config.save_every_steps == 0:
                    save(f"step_{step:08d}.pt")
                    state.prune_step_checkpoints(checkpoints)

            epoch, step_in_epoch = epoch + 1, 0
            if validator and (epoch % config.val_frequency == 0 or epoch == config.epochs):
                metrics = validator()
                log.metrics(step, metrics)
                bar.write(f"epoch {epoch}: " + _readable(metrics), file=sys.stderr)
            if epoch % config.save_frequency == 0 or epoch == config.epochs:
                save(f"epoch_{epoch}.pt")
                if config.delete_previous_checkpoint:
                    state.prune_epoch_checkpoints(checkpoints, keep=epoch)
    finally:
        bar.close()
        log.close()
        plot_loss(run)
        if faults.counts:
            print(f"skipped samples and shards: {faults.summary()}", file=sys.stderr)
    return run


class _Normalise:
    """uint8 images to the towers' input: scaled to [0, 1], less the mean, over the deviation."""

    def __init__(self, preprocess: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(preprocess["mean"], device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocess["std"], device=device).view(3, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return (images.float() - self.mean) / self.std


class _Meter:
    """Samples a second and the share of time spent waiting for data, between two readings."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def waiting(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def step(self) -> None:
        self.steps += 1

    def read(self, device: torch.device) -> dict[str, float]:
        elapsed = time.perf_counter() - self.started
        values = {
            "samples_per_second": self.steps * self.batch_size / elapsed,
            "data_wait": self.waited / elapsed,
        }
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self._reset()
        return values


def _postfix(values: dict[str, Any]) -> str:
    return (
        f"loss {values['loss']:.3f}  {values['samples_per_second']:.0f} samples/s  "
        f"data wait {values['data_wait']:.0%}"
    )


def _readable(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())
