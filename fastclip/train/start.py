"""Making a run ready for its first step, new or resumed."""

import math
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastclip.data.order import hash64
from fastclip.messages import note
from fastclip.models.build import build
from fastclip.models.clip import Model
from fastclip.train.classifier import begin_classifier, class_names
from fastclip.train.config import TrainConfig
from fastclip.train.describe import announce, write_description
from fastclip.train.distributed import World
from fastclip.train.inherited import LATEST
from fastclip.train.layers import replace_layers
from fastclip.train.log import check_reporters
from fastclip.train.report import Report
from fastclip.train.resume import check_same_data, read_resumed
from fastclip.train.run_directory import hold
from fastclip.train.select_engine import build_engine
from fastclip.train.state import TrainState
from fastclip.train.streams import restore_rng, seed_rng
from fastclip.train.training_data import build_loader, require_same_data
from fastclip.train.validate import Evaluation


def start(
    config: TrainConfig, world: World, around: ExitStack
) -> tuple[TrainState, Evaluation | None, Report]:
    """Everything that a run needs; called on all ranks.

    The order of what follows is part of a run's results: much of it draws from the random streams.

    Args:
        config: with a name.
        around: is left when the run has ended.

    Returns:
        The state before the next step, the evaluation where there are data for one, and the
        report.
    """
    folder = Path(config.log.logs) / str(config.log.name)
    check_reporters(config)
    # before anything is looked for in it: two starts of one name must not both begin
    hold(folder, world, around)
    path, resumed = read_resumed(config, folder, world)
    if config.optim.deterministic:
        # cuBLAS reads this when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    seed_rng(config.optim.seed)
    classes = class_names(config)
    model = _build_model(config, classes, world, new=path is None)
    loader = build_loader(config, model, classes, world)
    require_same_data(loader, world)
    around.enter_context(loader.reporting_worker_failure())
    evaluation = _build_evaluation(config, model, classes, world)
    engine = build_engine(model, config, world, sum(loader.samples.order.counts))
    if evaluation is not None:
        evaluation.include(engine.average)
    state = TrainState(config, world, folder, model, loader, engine)
    if path is not None and resumed is not None:
        remembering = engine.objective.memory is not None
        check_same_data(resumed, loader, world, remembering=remembering)
        engine.load(path, resumed)
        engine.skipped = resumed.get("skipped", 0)
        state.step = resumed["step"]
        state.epoch, state.position = resumed["data"]["epoch"], resumed["data"]["position"]

    # no rank may look for the folder after the first has made it
    world.barrier()
    if world.is_first:
        state.checkpoints.mkdir(parents=True, exist_ok=True)
        write_description(folder, config, model, classes)
        announce(state)
        if path is None and config.checkpoint.resume == LATEST:
            note(f"{state.checkpoints} holds no checkpoint: this is a new run; check --name")
        if path is not None and state.epoch >= config.optim.epochs:
            note("this run is complete, there is nothing left to train; more --epochs continue it")
    report = Report(state)
    # last, so that nothing else draws from these streams
    _start_streams(config, world, resumed)
    return state, evaluation, report


def _build_model(config: TrainConfig, classes: list[str], world: World, *, new: bool) -> Model:
    """The model to train; what a resumed run began with is in its checkpoint."""
    if not new:
        lasting = config.model.lasting()
        model_options = replace(
            config.model, pretrained=None, finetune=None, classifier=lasting.classifier
        )
        config = replace(config, model=model_options)
    model = build(
        config.model.model,
        config.model,
        world.device,
        pretrained=config.model.pretrained,
        trust_checkpoint=config.checkpoint.trust_checkpoint,
        siglip=config.loss.siglip,
        classes=classes,
    )
    begin_classifier(config, model, classes)
    _begin_temperature(config, model)
    replace_layers(model.model, config.model)
    # convolutions are fastest with channels innermost, and nothing else minds
    model.model.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def _begin_temperature(config: TrainConfig, model: Model) -> None:
    """Let a global loss's temperature begin as the flags have it, or stay at that."""
    options = config.loss
    if options.loss != "global":
        return
    scale = model.model.get_parameter("logit_scale")
    if options.global_temperature is not None:
        scale.fill_(-math.log(options.global_temperature))
    scale.requires_grad_(options.global_variant == "v3")
    # it has no part in the loss, and data-parallel training waits for every gradient
    bias = getattr(model.model, "logit_bias", None)
    if bias is not None:
        bias.requires_grad_(False)


def _build_evaluation(
    config: TrainConfig, model: Model, classes: list[str], world: World
) -> Evaluation | None:
    if not config.data.evaluations:
        return None
    if not world.is_first:
        return Evaluation(config, None)
    if config.distributed.sharded:
        # the engine shards or rounds the model's own parameters
        lasting = config.model.lasting()
        siglip = config.loss.siglip
        model = build(lasting.model, lasting, world.device, siglip=siglip, classes=classes)
    return Evaluation(config, model)


def _start_streams(config: TrainConfig, world: World, resumed: dict[str, Any] | None) -> None:
    """This rank's random streams: those of before, or else of its own."""
    if world.rank > 0:
        seed_rng(hash64(config.optim.seed, world.rank))
    # not all may have been saved: a checkpoint of CPUs has none of GPUs
    if resumed is not None and world.rank < len(resumed["rng"]):
        restore_rng(resumed["rng"][world.rank], world.device)
