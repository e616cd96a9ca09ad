"""Optimiser and learning-rate schedule."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from fastclip.train.config import TrainConfig

LOGIT_SCALE_MAX = math.log(100)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: none on norms, biases and the logit scale."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.wd},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of `step` (from 0): linear warm-up, then half a cosine to 0 or a constant.

    A warm-up longer than the whole run never ends, so it is cut at a tenth of the run.
    """
    warmup = config.warmup if config.warmup < total_steps else total_steps // 10
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_scheduler == "const":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) * config.lr


@torch.no_grad()
def clamp(model: nn.Module, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Keep the named parameters between their least and greatest values.

    Of a logit scale these are 1 and 100, exponentiated, as CLIP has it (section 2.5).
    """
    for name, (least, greatest) in bounds.items():
        model.get_parameter(name).clamp_(least, greatest)
