"""Optimizer and learning-rate schedule."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastclip import native
from fastclip.integrations import apex
from fastclip.train.options import OptimOptions

LOGIT_SCALE_MAX = math.log(100)
_CONFIGURED = ("lr", "lr_factor", "betas", "eps", "weight_decay", "momentum", "fused")


def build_optimizer(
    model: nn.Module, options: OptimOptions, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer with weight decay on matrices only: none on norms, biases and scales.

    Args:
        model: whose parameters it has, but for frozen ones.
        options: rates and decays.
        rates: of parameters with a learning rate of their own, by name; each is a group without
            weight decay, whose "lr_factor" is its rate by that of the others.

    Raises:
        ValueError: it is one of apex's, and apex is not there; or one that timm has not, or that
            needs second derivatives.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    rates = rates or {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in rates:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.wd},
        {"params": plain, "weight_decay": 0.0},
    ]
    for name, rate in rates.items():
        own = {"params": [model.get_parameter(name)], "weight_decay": 0.0}
        groups.append({**own, "lr": rate, "lr_factor": rate / options.lr})
    made: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, **made, fused=True)
    if options.optimizer.startswith("timm/"):
        return _of_timm(options, groups, made)
    name = {"apex-adamw": "FusedAdam", "apex-lamb": "FusedLAMB"}[options.optimizer]
    return apex.optimizer(name, groups, **made)


def _of_timm(
    options: OptimOptions, groups: Sequence[dict[str, Any]], made: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """One of timm's; each takes of the rates and decays what it has."""
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name = options.optimizer.removeprefix("timm/")
    known: list[str] = [str(each) for each in list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"--optimizer timm/{name}: timm has none of that name{hint}")
    if get_optimizer_info(name).second_order:
        raise ValueError(
            f"--optimizer timm/{name} needs second derivatives, which the losses have not; use "
            "another"
        )
    further = dict(made)
    if options.momentum is not None:
        further["momentum"] = options.momentum
    return create_optimizer_v2(list(groups), name, weight_decay=options.wd, **further)


def configured(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags say of a group of parameters; the rest of it is the optimizer's state."""
    return {key: group[key] for key in _CONFIGURED if key in group}


def check_groups(saved: int, groups: Sequence[Any]) -> None:
    """Refuse a checkpoint whose optimizer had other groups of parameters.

    Raises:
        ValueError: it had another number of them.
    """
    if saved != len(groups):
        raise ValueError(
            f"the checkpoint's optimizer has {saved} groups of parameters, this run's "
            f"{len(groups)}: give --global-temperature-lr to both or to neither"
        )


def warmup_steps(options: OptimOptions, total_steps: int) -> int:
    """Those of --warmup; a tenth of a run that is no longer than they are."""
    return options.warmup if options.warmup < total_steps else total_steps // 10


def cooldown_steps(options: OptimOptions, total_steps: int) -> int:
    """The last steps of a run, of a schedule that cools down."""
    if not options.cools_down:
        return 0
    if options.epochs_cooldown is None:
        return total_steps // 5
    return total_steps * options.epochs_cooldown // options.epochs


def learning_rate(options: OptimOptions, step: int, total_steps: int) -> float:
    """The rate of `step`, from 0: of nothing but these, so that a resumed run has the same.

    Linear warm-up, then half a cosine to 0, or a constant that may cool down in the last steps: as
    open_clip's (1 - x)^p, or as 1 - x^p, which with p = 1/2 Hagele et al. 2024 find the best
    (arXiv:2405.18392, section 3).
    """
    warmup = warmup_steps(options, total_steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.lr_scheduler == "cosine":
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress)) * options.lr
    cooldown = cooldown_steps(options, total_steps)
    if step < total_steps - cooldown or cooldown == 0:
        return options.lr
    progress = min(1.0, (step - (total_steps - cooldown)) / cooldown)
    power = options.lr_cooldown_power
    if options.lr_scheduler == "wsd":
        left = 1 - progress ** (0.5 if power is None else power)
    else:
        left = (1 - progress) ** (1.0 if power is None else power)
    return options.lr_cooldown_end + left * (options.lr - options.lr_cooldown_end)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, 0-d; NaN or infinite where one of them is.

    `torch.nn.utils.get_total_norm` in one call where they are float32 on a CPU: of a small model's
    many tensors that one takes as long as a tenth of the step.
    """
    if native.unavailable_reason() is None and all(map(_is_plain, gradients)):
        places = [(gradient.data_ptr(), gradient.numel()) for gradient in gradients]
        total = native.library().sum_of_squares(places, torch.get_num_threads())
        return torch.tensor(math.sqrt(total))
    return nn.utils.get_total_norm(gradients)


def _is_plain(gradient: Tensor) -> bool:
    """Whether its entries lie one after the other, in any order, in the CPU's memory."""
    if type(gradient) is not Tensor or not gradient.is_cpu or gradient.dtype != torch.float32:
        return False
    if gradient.layout != torch.strided:
        return False
    return gradient.is_contiguous() or (
        gradient.ndim == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    )


@torch.no_grad()
def clamp(model: nn.Module, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Keep the named parameters between their least and greatest values.

    Of a logit scale these are 1 and 100, exponentiated, as CLIP has it (section 2.5).
    """
    for name, (least, greatest) in bounds.items():
        model.get_parameter(name).clamp_(least, greatest)
