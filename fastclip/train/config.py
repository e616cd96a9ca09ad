"""The training configuration: one frozen dataclass, filled from a YAML file and flags.

A YAML file is read as a list of flags in front of the command line's: one parser, one set of
types, and a flag given by hand wins.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastclip.bounded import read_yaml
from fastclip.data.options import DataOptions
from fastclip.flags import flag, ordered, parse_grouped, refuse_renamed
from fastclip.models.options import SystemOptions
from fastclip.ops.backend import IMPLEMENTATIONS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# the names of before of a field's values: read from files, refused on the command line
OLD_VALUES = {"data_backend": {"torchvision": "cpu"}}


@dataclass(frozen=True)
class TrainConfig(SystemOptions, DataOptions):
    """Train a CLIP model, or another system. Flag names are open_clip's where it has them."""

    name: str | None = flag(None, "log", defines_run=False)
    """Name of the run directory under --logs; by default the time and the model."""
    logs: str = flag("logs", "log", defines_run=False)
    """Directory that holds the run directories."""
    resume: str | None = flag(None, "checkpoint", defines_run=False)
    """"latest" (of the run called --name) or the path of a checkpoint."""

    train_data: str = flag("scenes", "data", defines_run=True)
    """Shards, e.g. '/data/{00000..00041}.tar' or 's3://bucket/{000..041}.tar'; a CSV or COCO
    captions file; a folder with a folder of images a class; 'synthetic'; 'scenes', or a variant
    like 'scenes:caption=dense,shift=style'. Several of one type are joined by '::'."""
    train_data_upsampling_factors: str | None = flag(None, "data", defines_run=True)
    """How many times an epoch passes over each pattern of --train-data, e.g. 1::2.5."""
    val_data: str | None = flag(None, "data", defines_run=False)
    """As --train-data; evaluated every --val-frequency epochs."""
    val_image_root: str | None = flag(None, "data", defines_run=False)
    """As --image-root, for --val-data."""
    train_num_samples: int | None = flag(None, "data", defines_run=True)
    """Samples an epoch; all by default (20,000 for scenes, 1,000 for synthetic)."""
    shuffle_window: int = flag(32768, "data", defines_run=True)
    """Samples shuffled together after the shards were."""

    model: str = flag("RN10t-64", "model", defines_run=True)
    """A model of open_clip's, a config shipped with fastclip, or a path to a JSON config."""
    pretrained: str | None = flag(None, "model", defines_run=False)
    """Weights to begin with: a name of open_clip's, e.g. 'laion2b_s34b_b79k', or a checkpoint."""
    precision: Literal["fp32", "amp", "amp_bf16"] = flag("amp_bf16", "model", defines_run=True)
    """Precision of the towers: float32, float16 with a loss scale, or bfloat16. Parameters stay
    float32."""
    grad_checkpointing: bool = flag(False, "model", defines_run=True)
    """Recompute the towers' activations in the backward pass instead of keeping them."""
    device: str = flag("auto", "distributed", defines_run=True)
    """"auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1"."""
    torchcompile: bool = flag(False, "model", defines_run=True)
    """Compile the towers with torch.compile."""

    attention: Literal["tower", "auto", "triton", "sdpa", "flash", "reference"] = flag(
        "tower", "model", defines_run=True
    )
    """tower: the towers' own attention. Otherwise fastclip's under the same weights, by the fastest
    implementation that was measured (auto) or the one named."""
    layer_norm: Literal["torch", "apex"] = flag("torch", "model", defines_run=True)
    """The towers' layer norms: torch's, or apex's fused one where NVIDIA's apex is installed."""

    data_backend: Literal["auto", "dali", "cpu"] = flag("auto", "data", defines_run=True)
    """What decodes and augments images. dali: DALI, on the GPU if there is one. cpu: the loader
    processes. auto uses DALI if it is installed and there is a GPU; on a CPU DALI is slower."""
    augment: Literal["crop", "weak", "strong"] | None = flag(None, "data", defines_run=True)
    """crop: a random crop, of 0.9 of the image or more. weak, strong: CLIP-Rocket's views, crops of
    0.5 and of 0.08 or more; the strong one has flip, color jitter, grayscale and blur. By default
    crop, or weak where --objective has strong views besides."""
    aug_scale: tuple[float, float] | None = flag(None, "data", defines_run=True)
    """Least and greatest share of the image that a random crop keeps, in place of --augment's."""
    strong_scale: tuple[float, float] | None = flag(None, "data", defines_run=True)
    """As --aug-scale, for the strong views of --objective."""
    aug_flip: float | None = flag(None, "data", defines_run=True)
    """Probability of a horizontal flip, in place of --augment's."""
    sentence_sampling: bool = flag(False, "data", defines_run=True)
    """Train on a random part of a caption's sentences, in their order."""
    text_augment: Literal["none", "weak", "strong"] = flag("none", "data", defines_run=True)
    """weak: stop-words removed, often. strong: then a synonym, a swap or a deletion as well. The
    strong views of --objective are strong in any case."""

    batch_size: int = flag(128, "optim", defines_run=True)
    """Samples a micro-batch of one process; times --accum-freq and the processes, of a step."""
    accum_freq: int = flag(1, "optim", defines_run=True)
    """Micro-batches a step. Their gradient is exactly that of the whole batch, of every parameter;
    the towers run forward twice."""
    epochs: int = flag(32, "optim", defines_run=True)
    """Passes over the data."""
    optimizer: Literal["adamw", "apex-adamw", "apex-lamb"] = flag(
        "adamw", "optim", defines_run=True
    )
    """torch's fused AdamW, or apex's FusedAdam or FusedLAMB where NVIDIA's apex is installed."""
    lr: float = flag(5e-4, "optim", defines_run=True)
    """Learning rate after warm-up."""
    beta1: float = flag(0.9, "optim", defines_run=True)
    """Adam's first decay rate."""
    beta2: float = flag(0.98, "optim", defines_run=True)
    """Adam's second decay rate."""
    eps: float = flag(1e-6, "optim", defines_run=True)
    """Adam's epsilon."""
    wd: float = flag(0.2, "optim", defines_run=True)
    """Weight decay; norms, biases and the logit scale have none."""
    warmup: int = flag(10000, "optim", defines_run=True)
    """Steps of linear warm-up."""
    lr_scheduler: Literal["cosine", "const"] = flag("cosine", "optim", defines_run=True)
    """Learning-rate schedule after warm-up."""
    grad_clip_norm: float | None = flag(None, "optim", defines_run=True)
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema: float | None = flag(None, "optim", defines_run=True)
    """Keep an average of the weights that keeps this share of itself in each step, e.g. 0.999, and
    evaluate it too. byolip's teacher is this average, by default with 0.99."""
    siglip: bool = flag(False, "loss", defines_run=True)
    """The sigmoid loss; the model gets a logit bias."""
    local_loss: bool = flag(False, "loss", defines_run=False)
    """open_clip's flag; the work is shared among the processes in any case."""
    gather_with_grad: bool = flag(True, "loss", defines_run=False)
    """open_clip's flag; without it the gradient would not be the full batch's."""
    loss_dist_impl: Literal["gather", "ring", "bidir", "shift", "reduce"] = flag(
        "gather", "loss", defines_run=True
    )
    """How processes exchange features: all at once (gather; reduce), or one process's after the
    other in less memory (ring; bidir, shift)."""
    loss_backend: str = flag("auto", "loss", defines_run=True)
    """Implementation of the loss: auto, torch or reference."""

    deepspeed: bool = flag(False, "distributed", defines_run=True)
    """Train with DeepSpeed's ZeRO, which shards optimizer, gradients and parameters."""
    deepspeed_config: str | None = flag(None, "distributed", defines_run=True)
    """DeepSpeed's JSON file, or ds_zero1, ds_zero2, ds_zero3; "auto" there takes our flags."""
    trust_checkpoint: bool = flag(False, "checkpoint", defines_run=False)
    """Resume from DeepSpeed's files, which are pickles: they can run any code when loaded."""
    local_rank: int | None = flag(None, "distributed", defines_run=False)
    """Given by DeepSpeed's launcher; the environment says the same."""
    dead_rank_timeout: float = flag(60.0, "distributed", defines_run=False)
    """Seconds without a heartbeat after which a rank counts as dead and the others end."""
    data_timeout: float = flag(1800.0, "distributed", defines_run=False)
    """Seconds that a rank may wait for a batch before the run ends."""

    workers: int = flag(4, "data", defines_run=False)
    """Processes that load data; 0 loads in the training process. Does not change the samples."""
    seed: int = flag(0, "optim", defines_run=True)
    """Of the initial weights, the order of samples and the augmentation."""
    deterministic: bool = flag(False, "optim", defines_run=True)
    """Only algorithms that are bitwise reproducible, also on a GPU; slower there."""

    save_frequency: int = flag(1, "checkpoint", defines_run=False)
    """Epochs between checkpoints."""
    save_every_steps: int | None = flag(None, "checkpoint", defines_run=False)
    """Steps between further checkpoints, of which the newest two are kept."""
    delete_previous_checkpoint: bool = flag(False, "checkpoint", defines_run=False)
    """Keep only the newest epoch's checkpoint."""
    val_frequency: int = flag(1, "log", defines_run=False)
    """Epochs between evaluations on --val-data."""
    log_every_n_steps: int = flag(10, "log", defines_run=False)
    """Steps between lines of metrics."""
    log_sample_ids: bool = flag(False, "log", defines_run=False)
    """Write the keys of each step's samples to samples.jsonl."""
    report_to: str = flag("tensorboard", "log", defines_run=False)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, both joined by a comma, or
    none."""

    def __post_init__(self) -> None:
        SystemOptions.__post_init__(self)
        DataOptions.__post_init__(self)
        if self.siglip and (self.objective != "clip" or self.hard_negatives):
            raise ValueError(
                "--siglip is a loss of --objective clip without --hard-negatives; leave it out"
            )
        if self.objective == "simclr" and self.val_data:
            raise ValueError(
                "--val-data: simclr has no classifier; evaluate what --finetune makes of it"
            )
        if self.strong_scale is not None and not self.strong:
            raise ValueError(f"--strong-scale: {self.objective} has no strong views; leave it out")
        if self.objective == "simclr" and (self.augment or self.aug_scale or self.aug_flip):
            raise ValueError(
                "--augment, --aug-scale, --aug-flip are for the weak view, which simclr has not; "
                "give --strong-scale"
            )
        if not self.views[1] and (self.sentence_sampling or self.text_augment != "none"):
            raise ValueError(
                f"--sentence-sampling, --text-augment: {self.objective} trains without texts; "
                "leave them out"
            )
        if self.deepspeed and self.optimizer != "adamw":
            raise ValueError(
                f"--optimizer {self.optimizer}: ZeRO shards torch's AdamW; leave the flag out with "
                "--deepspeed"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"--ema is {self.ema}; give one in [0, 1), e.g. 0.999")
        if self.siglip and self.label_smoothing:
            raise ValueError(
                "--label-smoothing is for the softmax loss; leave it out with --siglip"
            )
        if not self.gather_with_grad:
            raise ValueError(
                "--no-gather-with-grad is not the full batch's gradient; leave the flag out"
            )
        least = {
            "accum_freq": 1,
            "batch_size": 1,
            "epochs": 1,
            "warmup": 0,
            "workers": 0,
            "save_frequency": 1,
        }
        least |= {"dead_rank_timeout": 5, "data_timeout": 1}
        least |= {"val_frequency": 1, "log_every_n_steps": 1, "lr": 0, "wd": 0, "shuffle_window": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}; give at least {minimum}")
        known = [implementation.name for implementation in IMPLEMENTATIONS["similarity"]]
        if self.loss_backend not in ["auto", *known]:
            raise ValueError(
                f"--loss-backend {self.loss_backend} is unknown; use auto or {', '.join(known)}"
            )
        unknown = self.reporters - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(
                f"--report-to {self.report_to}: {', '.join(sorted(unknown))} is unknown; use "
                "tensorboard, wandb, tensorboard,wandb or none"
            )
        for name in ("save_every_steps", "train_num_samples", "grad_clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; give a positive number")

    def step_samples(self, processes: int) -> int:
        """Samples of a step over all processes."""
        return self.batch_size * self.accum_freq * processes

    @property
    def reporters(self) -> set[str]:
        """The names in --report-to."""
        return set(self.report_to.replace("none", "").split(",")) - {""}


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a command line, which may hold `--config FILE` or `--config RECIPE`.

    Raises:
        ValueError: the file has an unknown key; the message names the nearest known one. Or a
            flag's value has been renamed; the message names the new one.
        FileNotFoundError: there is no such file or recipe.
        ValueError: a value is of the right type and impossible, e.g. no epochs.
        SystemExit: a flag is unknown or a value of the wrong type (said on standard error).
    """
    arguments, files = _take_config(list(arguments))
    for name, values in OLD_VALUES.items():
        flag = "--" + name.replace("_", "-")
        refuse_renamed(arguments, {f"{flag} {old}": f"{flag} {new}" for old, new in values.items()})
    given = [each for file in files for each in _flags_of(file)]
    return TrainConfig(**parse_grouped(TrainConfig, given + arguments, "fastclip train"))


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration in the order of `--help`, as `--config` reads it back."""
    import yaml

    values = {each.name: getattr(config, each.name) for each in ordered(TrainConfig)}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return yaml.safe_dump(values, sort_keys=False)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `dataclasses.asdict` gave."""
    plain: Any = {
        name: tuple(value) if isinstance(value, list) else _renamed(name, value)
        for name, value in values.items()
    }
    return TrainConfig(**plain)


def _renamed(name: str, value: Any) -> Any:
    """A field's value by the name that it has now."""
    return OLD_VALUES[name].get(str(value), value) if name in OLD_VALUES else value


def _take_config(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Split `--config X` and `--config=X` from the other arguments."""
    rest: list[str] = []
    files: list[Path] = []
    tokens = iter(arguments)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if flag != "--config":
            rest.append(token)
            continue
        if not equals:
            value = next(tokens, "")
        files.append(_find_config(value))
    return rest, files


def _find_config(name: str) -> Path:
    shipped = RECIPES / f"{name}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"config {name!r} is neither a file nor a recipe ({recipes})")


def _flags_of(file: Path) -> list[str]:
    values = read_yaml(file) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be a list of `key: value` lines")
    known = {field.name for field in fields(TrainConfig)}
    flags: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{file}: unknown key {key!r}{hint}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        else:
            flags.append(flag)
            value = _renamed(name, value)
            flags += [str(item) for item in (value if isinstance(value, list) else [value])]
    return flags
