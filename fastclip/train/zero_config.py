"""DeepSpeed's configuration: a JSON file whose "auto" values and contradictions fastclip settles.

One value has one place. What is a flag of `fastclip train` may stand in the file as "auto", which
takes the flag's value, or must be equal to it; everything else in the file goes to DeepSpeed as it
is.
"""

import json
from pathlib import Path
from typing import Any

from fastclip.bounded import read_object
from fastclip.train.config import RECIPES, TrainConfig

DEFAULT = "ds_zero1"
STAGES = (1, 2, 3)

# Positions at which "auto" means DeepSpeed's own default, as in files written for other trainers.
_DEEPSPEED_DECIDES = (
    ("zero_optimization", "reduce_bucket_size"),
    ("zero_optimization", "allgather_bucket_size"),
    ("zero_optimization", "stage3_prefetch_bucket_size"),
    ("zero_optimization", "stage3_param_persistence_threshold"),
)
# Settings that the engine cannot work with: position, the only value it takes, why.
_REFUSED: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("torch_autocast", "enabled"), False, "DeepSpeed casts the parameters, by --precision"),
    (("managed_gradient_accumulation",), True, "fastclip decides when gradients are reduced"),
    (("zero_optimization", "compute_grad_norm"), True, "a step is checked by its gradient's norm"),
    (("data_types", "grad_accum_dtype"), None, "accumulated gradients have the towers' type"),
    (("checkpoint", "load_universal"), False, "checkpoints are converted when they must be"),
    (("zero_optimization", "zenflow"), None, "its updates lag behind the gradients"),
)


def resolve(
    name: str | None, config: TrainConfig, *, micro_batches: int = 1, world_size: int = 1
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, without "auto".

    DeepSpeed sees one micro-batch a step: `fastclip.train.accumulate` cuts the batch, and its
    surrogates must be added up, not averaged.

    Args:
        name: path of a JSON file, or a shipped one: ds_zero1 (also for None), ds_zero2, ds_zero3.
        config: flags that fill "auto".
        micro_batches: how many make a step's batch.
        world_size: number of processes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a JSON object, contradicts a flag, or holds what cannot be used.
    """
    path = _find(name or DEFAULT)
    given = read_object(path)
    stage = _get(given, ("zero_optimization", "stage"))
    if stage not in STAGES:
        raise ValueError(
            f"{path}: zero_optimization.stage is {stage}; give 1, 2 or 3, or train without "
            "--deepspeed (plain data-parallel training is what stage 0 does)"
        )
    for position, only, reason in _REFUSED:
        value = _get(given, position)
        if value not in (None, only):
            raise ValueError(f"{path}: {'.'.join(position)} is {_json(value)}: {reason}; remove it")
    for part in ("offload_optimizer", "offload_param"):
        if _get(given, ("zero_optimization", part, "device")) == "nvme":
            raise ValueError(f'{path}: zero_optimization.{part} is to "nvme"; only "cpu" works')
    _drop_optimizer(given, config, path)

    flags = {
        ("train_micro_batch_size_per_gpu",): (config.optim.batch_size, "--batch-size"),
        ("gradient_accumulation_steps",): (micro_batches, "--accum-freq"),
        ("train_batch_size",): (
            config.optim.batch_size * micro_batches * world_size,
            "--batch-size, --accum-freq and the number of processes",
        ),
        ("gradient_clipping",): (config.optim.grad_clip_norm or 0.0, "--grad-clip-norm"),
        ("bf16", "enabled"): (config.model.precision == "amp_bf16", "--precision"),
        ("fp16", "enabled"): (config.model.precision == "amp", "--precision"),
    }
    for position, (wanted, flag) in flags.items():
        value = _get(given, position)
        if value not in (None, "auto", wanted):
            raise ValueError(
                f"{path}: {'.'.join(position)} is {_json(value)} but {flag} gives "
                f'{_json(wanted)}; change one, or write "auto" in the file'
            )
        _set(given, position, wanted)
    for position in _DEEPSPEED_DECIDES:
        if _get(given, position) == "auto":
            del given["zero_optimization"][position[-1]]
    unknown = _auto_positions(given)
    if unknown:
        raise ValueError(
            f'{path}: {", ".join(unknown)} is "auto", which nothing fills; give a value or remove '
            f"it (filled are {', '.join('.'.join(position) for position in flags)})"
        )

    # one reduction a step, whatever the number of micro-batches
    given["train_micro_batch_size_per_gpu"] = config.optim.batch_size * micro_batches
    given["gradient_accumulation_steps"] = 1
    given["train_batch_size"] = config.optim.batch_size * micro_batches * world_size
    # torch's AdamW also where DeepSpeed would rather have its own, which needs a compiler
    given["zero_force_ds_cpu_optimizer"] = False
    given.setdefault("steps_per_print", 2**31)
    return given


def _find(name: str) -> Path:
    for path in (Path(name), RECIPES / f"{name}.json"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("ds_*.json")))
    raise FileNotFoundError(f"DeepSpeed config {name!r} is neither a file nor shipped ({shipped})")


def _drop_optimizer(given: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Take out an optimizer section that says what the flags say; refuse any other."""
    if given.pop("scheduler", "auto") != "auto":
        raise ValueError(
            f"{path} has a scheduler section, but fastclip's own schedule is used: remove it and "
            "give --lr-scheduler, --warmup and --lr"
        )
    section = given.pop("optimizer", "auto")
    if section == "auto":
        return
    kind = section.get("type") if isinstance(section, dict) else section
    if str(kind).lower() not in ("adamw", "auto"):
        raise ValueError(
            f"{path}: optimizer.type is {_json(kind)}, but fastclip's own AdamW is used: remove "
            "the optimizer section and give --lr, --beta1, --beta2, --eps and --wd"
        )
    flags = {
        "lr": (config.optim.lr, "--lr"),
        "betas": ([config.optim.beta1, config.optim.beta2], "--beta1 and --beta2"),
        "eps": (config.optim.eps, "--eps"),
        "weight_decay": (config.optim.wd, "--wd"),
    }
    params = section.get("params", {}) if isinstance(section, dict) else {}
    if not isinstance(params, dict):
        raise ValueError(f"{path}: optimizer.params is {_json(params)}; give an object or none")
    for key, value in params.items():
        if key not in flags:
            raise ValueError(
                f"{path}: optimizer.params.{key} is not an option of fastclip's AdamW; remove it"
            )
        wanted, flag = flags[key]
        if value not in ("auto", wanted):
            raise ValueError(
                f"{path}: optimizer.params.{key} is {_json(value)} but {flag} gives "
                f'{_json(wanted)}; change one, or write "auto" in the file'
            )


def _get(tree: Any, position: tuple[str, ...]) -> Any:
    for key in position:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _set(tree: dict[str, Any], position: tuple[str, ...], value: Any) -> None:
    for key in position[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"DeepSpeed's {key} is {_json(tree)}; give an object, as its pages do")
    tree[position[-1]] = value


def _auto_positions(tree: Any, prefix: str = "") -> list[str]:
    if isinstance(tree, dict):
        parts = [_auto_positions(value, f"{prefix}.{key}") for key, value in tree.items()]
        return [position for part in parts for position in part]
    return [prefix[1:]] if tree == "auto" else []


def _json(value: Any) -> str:
    return json.dumps(value)
