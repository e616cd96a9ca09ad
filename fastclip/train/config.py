"""The training configuration: sections of flags, filled from a YAML file and the command line.

A YAML file is read as a list of flags in front of the command line's: one parser, one set of
types, and a flag given by hand wins. So does a file over the one that it extends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastclip.bounded import read_yaml
from fastclip.command_line import parse_sections, refuse_renamed
from fastclip.data.options import without_commands
from fastclip.flags import arrange, flag_name, inherited, ordered, sections
from fastclip.train.inherited import settings_of
from fastclip.train.open_clip_flags import adapted, is_foreign
from fastclip.train.options import (
    CheckpointOptions,
    DistributedOptions,
    LogOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    TrainingDataOptions,
)

EXTENDS = "extends"
"""The key of a file or recipe whose flags a YAML file begins with."""
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# the names of before of a field's values: read from files, refused on the command line
OLD_VALUES = {"data_backend": {"torchvision": "cpu"}}
# of `--help`; files are by section
HEADINGS = {
    "data": "What to train on, and how it is read and augmented.",
    "model": "What is trained, and what it begins with.",
    "loss": "What the loss is, how it is computed, and how processes share it.",
    "optimization": "Batches and updates.",
    "schedule": "How long, and the learning rate over that time.",
    "checkpoint": "Saving and resuming.",
    "evaluation": "What is measured while training.",
    "device": "Devices, processes and precision.",
    "reporting": "The run directory and what is written there.",
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a CLIP model, or another system. Flag names are open_clip's where it has them."""

    data: TrainingDataOptions = field(
        default_factory=TrainingDataOptions, metadata={"heading": "data"}
    )
    model: ModelOptions = field(default_factory=ModelOptions, metadata={"heading": "model"})
    optim: OptimOptions = field(default_factory=OptimOptions, metadata={"heading": "optimization"})
    loss: LossOptions = field(default_factory=LossOptions, metadata={"heading": "loss"})
    distributed: DistributedOptions = field(
        default_factory=DistributedOptions, metadata={"heading": "device"}
    )
    checkpoint: CheckpointOptions = field(
        default_factory=CheckpointOptions, metadata={"heading": "checkpoint"}
    )
    log: LogOptions = field(default_factory=LogOptions, metadata={"heading": "reporting"})

    def __post_init__(self) -> None:
        model, data = self.model, self.data
        objective = model.objective
        if self.loss.siglip and (objective != "clip" or model.hard_negatives):
            raise ValueError(
                "--siglip is a loss of --objective clip without --hard-negatives; leave it out"
            )
        if self.loss.siglip and model.label_smoothing:
            raise ValueError(
                "--label-smoothing is for the softmax loss; leave it out with --siglip"
            )
        if self.loss.loss == "global":
            self._check_global()
        if self.loss.distills:
            self._check_distillation()
        if self.loss.group_duplicates and (objective != "clip" or model.hard_negatives):
            raise ValueError(
                "--group-duplicates is for --objective clip without --hard-negatives; leave it out"
            )
        if objective == "classify" and data.retrieval_data:
            raise ValueError("--retrieval-data: a classifier has no texts; leave it out")
        if self.checkpoint.best_metric and not data.evaluations:
            raise ValueError(
                f"--best-metric {self.checkpoint.best_metric} needs an evaluation: give "
                "--val-data, --zeroshot-data or --retrieval-data"
            )
        best = self.checkpoint.best_metric
        # here, where all ranks find it
        if best and data.evaluations and not best.startswith(data.evaluations):
            raise ValueError(
                f"--best-metric {best} is measured on none of the data; give one whose name begins "
                f"with {' or '.join(data.evaluations)}"
            )
        if objective == "simclr" and data.evaluations:
            raise ValueError(
                "--val-data, --zeroshot-data, --retrieval-data: simclr has no classifier; evaluate "
                "what --finetune makes of it"
            )
        if objective == "simclr" and (data.augment or data.aug_scale or data.aug_flip):
            raise ValueError(
                "--augment, --aug-scale, --aug-flip are for the weak view, which simclr has not; "
                "give --strong-scale"
            )
        if data.strong_scale is not None and not model.strong:
            raise ValueError(f"--strong-scale: {objective} has no strong views; leave it out")
        if data.aug_blur is not None and not (model.strong or data.augment == "strong"):
            raise ValueError(f"--aug-blur: {objective} has no strong views; leave it out")
        self._check_texts()
        if self.distributed.sharded and self.optim.optimizer != "adamw":
            raise ValueError(
                f"--optimizer {self.optim.optimizer}: ZeRO and FSDP2 shard torch's AdamW; leave "
                "the flag out with --deepspeed and --fsdp"
            )
        if self.distributed.deepspeed and model.prototypes_frozen_steps:
            raise ValueError(
                f"--prototypes-frozen-steps is {model.prototypes_frozen_steps}, but DeepSpeed "
                "updates all parameters together; give 0, or leave --deepspeed out"
            )
        if self.distributed.fsdp and model.torchcompile and model.grad_checkpointing:
            raise ValueError(
                "--torchcompile under --fsdp does not work with --grad-checkpointing; leave one out"
            )
        if model.text_dropout and model.torchcompile:
            raise ValueError("--torchcompile does not work with --text-dropout; leave one out")
        if self.distributed.fsdp and model.text_lm_cache_bytes:
            raise ValueError(
                f"--text-lm-cache-bytes is {model.text_lm_cache_bytes}, but FSDP2's ranks must "
                "run all layers together; leave it out with --fsdp"
            )

    def _check_texts(self) -> None:
        """Refuse what an objective without texts, or with one of a sample, has no use for."""
        model, data, objective = self.model, self.data, self.model.objective
        if not model.views[1] and (
            data.sentence_sampling or data.text_augment != "none" or data.clean_captions
        ):
            raise ValueError(
                f"--sentence-sampling, --text-augment, --clean-captions: {objective} trains "
                "without texts; leave them out"
            )
        if data.strong_text_augment is not None and model.views[1] < 2:
            raise ValueError(
                f"--strong-text-augment: {objective} has no texts of strong views; leave it out"
            )
        strong = model.views[1] > 1 and data.strong_text_augment != "none"
        augmented = data.text_augment != "none" or strong
        if data.stop_word_rate != 0.8 and not augmented:
            raise ValueError(
                f"--stop-word-rate is {data.stop_word_rate}, but no text is augmented; give "
                "--text-augment, or leave it out"
            )
        if data.caption_views == "multi" and model.views[1] < 2:
            raise ValueError(
                f"--caption-views multi: {objective} has one text of a sample at most; leave it out"
            )

    def _check_distillation(self) -> None:
        """Refuse what a teacher does not go with."""
        name = self.loss.teachers[0]
        if self.model.objective != "clip" or self.loss.siglip or self.loss.loss == "global":
            raise ValueError(
                f"{name} is for the softmax loss of --objective clip, without --siglip and --loss "
                "global; leave it out"
            )
        data = self.data
        varied = data.sentence_sampling or data.text_augment != "none" or data.captions
        if self.loss.distill_stored and varied:
            raise ValueError(
                f"{name} has one text a sample: leave out --captions, --sentence-sampling and "
                "--text-augment"
            )

    def _check_global(self) -> None:
        """Refuse what `--loss global` does not go with."""
        excluded = {
            f"--objective {self.model.objective}": self.model.objective != "clip",
            "--siglip": self.loss.siglip,
            "--hard-negatives": self.model.hard_negatives > 0,
            "--group-duplicates": self.loss.group_duplicates is not None,
            "--label-smoothing": self.model.label_smoothing > 0,
        }
        for name, given in excluded.items():
            if given:
                raise ValueError(f"--loss global does not go with {name}; leave one of them out")
        if self.loss.global_temperature_lr is not None and self.optim.lr == 0:
            raise ValueError("--global-temperature-lr follows the schedule of --lr, which is 0")

    @property
    def own_rates(self) -> dict[str, float]:
        """The learning rates of parameters that have one of their own, by name."""
        rate = self.loss.global_temperature_lr
        return {} if rate is None else {"logit_scale": rate}

    @classmethod
    def from_flat(cls, **values: Any) -> "TrainConfig":
        """The configuration with these flags, e.g. `TrainConfig.from_flat(lr=1e-3, epochs=3)`.

        Raises:
            ValueError: a flag is unknown, or its value impossible.
        """
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "") -> "TrainConfig":
        """The configuration with these values; see `fastclip.flags.arrange`.

        Args:
            values: by section, or flat, as runs of before have them; lists stand for tuples.
            origin: what they are of, for messages.
        """
        # of before, when data could be commands: what is read now is not said here
        plain = {key: value for key, value in values.items() if key != "allow_commands"}
        kinds, given = sections(cls), _arrange(plain, origin)
        parts: dict[str, Any] = {
            name: kinds[name](
                **{k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
            )
            for name, part in given.items()
        }
        return cls(**parts)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a command line, which may hold `--config FILE` or `--config RECIPE`.

    open_clip's flags are taken too, see `fastclip.train.open_clip_flags`. What `--resume` leaves
    out is as in the run that it names: its config.yaml is read in front of everything else.

    Raises:
        ValueError: the file has an unknown key; the message names the nearest known one. Or a
            flag's value has been renamed, or an open_clip flag is none here; the message says what
            to write instead.
        FileNotFoundError: there is no such file or recipe.
        ValueError: a value is of the right type and impossible, e.g. no epochs.
        SystemExit: a flag is unknown or a value of the wrong type (said on standard error).
    """
    arguments, files = _take_config(list(arguments))
    for name, values in OLD_VALUES.items():
        flag = flag_name(name)
        refuse_renamed(arguments, {f"{flag} {old}": f"{flag} {new}" for old, new in values.items()})
    given = [each for file in files for part in _chain(file) for each in adapted(_flags_of(part))]
    given += adapted(arguments)
    values = _values(given)
    typed = {flag.partition("=")[0].replace("_", "-") for flag in given}
    settings = settings_of(values, new=bool(files or typed & {"--train-data", "--model"}))
    if settings is None:
        return TrainConfig.from_dict(values)
    try:
        return TrainConfig.from_dict(
            _values([*_flags_of(settings, inherited(TrainConfig)), *given])
        )
    except ValueError as error:
        raise ValueError(f"{error} (what is not given is as in {settings})") from error


def _values(flags: Sequence[str]) -> dict[str, Any]:
    return parse_sections(TrainConfig, flags, "fastclip train", HEADINGS)


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration by section, in the order of `--help`, as `--config` reads it back."""
    import yaml

    values: dict[str, dict[str, Any]] = {}
    for name, section in sections(TrainConfig).items():
        part = {each.name: getattr(getattr(config, name), each.name) for each in ordered(section)}
        values[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()}
    return yaml.safe_dump(values, sort_keys=False)


def _arrange(values: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """Values by section and field, by the names that they have now."""
    arranged = arrange(TrainConfig, values, origin)
    for part in arranged.values():
        for name in part.keys() & OLD_VALUES.keys():
            part[name] = OLD_VALUES[name].get(str(part[name]), part[name])
    return arranged


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
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"config {name!r} is {_neither()}")


def _neither() -> str:
    recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    return f"neither a file nor a recipe ({recipes})"


def _chain(file: Path) -> list[Path]:
    """A file behind all that it extends, the first of them first."""
    chain = [file]
    while (name := _values_of(chain[0]).get(EXTENDS)) is not None:
        # beside the file, wherever the run starts
        places = (chain[0].parent / str(name), RECIPES / f"{name}.yaml")
        base = next((place for place in places if place.is_file()), None)
        if base is None:
            raise FileNotFoundError(f"{chain[0]} extends {name!r}, which is {_neither()}")
        if any(base.samefile(known) for known in chain):
            raise ValueError(f"{chain[0]} extends {name!r}, which extends it; delete one `extends`")
        chain.insert(0, base)
    return chain


def _values_of(file: Path) -> dict[Any, Any]:
    values = read_yaml(file) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be a list of `key: value` lines")
    return values


def _flags_of(file: Path, wanted: Sequence[str] | None = None) -> list[str]:
    """A file's values as they are typed; of fastclip's own flags all, or those that are wanted."""
    values = {key: value for key, value in _values_of(file).items() if key != EXTENDS}
    values = without_commands(values, str(file))
    # an open_clip switch that is off says nothing
    foreign = {key: value for key, value in values.items() if is_foreign(str(key))}
    flags = _as_flags({key: value for key, value in foreign.items() if value is not False})
    own = {key: value for key, value in values.items() if key not in foreign}
    for section in _arrange(own, str(file)).values():
        flags += _as_flags({k: v for k, v in section.items() if wanted is None or k in wanted})
    return flags


def _as_flags(values: Mapping[Any, Any]) -> list[str]:
    """Values by name as they are typed."""
    flags: list[str] = []
    for name, value in values.items():
        flag = flag_name(str(name))
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            # as one, since a value may begin with a dash
            flags.append(f"{flag}={value}")
    return flags
