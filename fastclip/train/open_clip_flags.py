"""The flags of the open_clip trainer (3.3): which are taken, and what replaces the others.

`FLAGS` is the table of docs/coming-from-open-clip.md too, which docs/make_open_clip.py writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastclip.messages import note

Status = Literal["same", "renamed", "no effect", "refused"]

_CONFIG = "give `--model` the path of a JSON config that has {}"
_SYNC = "copy the run directory with your storage's own tool, e.g. `rclone` or `aws s3 sync`"
_LAUNCHER = "start the processes with torchrun and give it the address"
_COCA = "CoCa is not trained here; `fastclip.CoCaLoss` replaces the loss in your own script"


@dataclass(frozen=True)
class Flag:
    """One flag of the open_clip trainer.

    Attributes:
        name: without dashes.
        status: "same": a flag of that name is here. "renamed": `becomes` replaces it. "no effect":
            it is accepted and dropped. "refused": it is an error.
        text: what differs; of one without effect, why; of a refused one, what to do instead. With
            backticks around code, which messages leave out.
        becomes: the flags that replace a renamed one. The value, if there is one, goes to the last.
        values: values with another name here.
        refused: values that are an error, and what to write instead.
    """

    name: str
    status: Status = "same"
    text: str = ""
    becomes: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def _same(*names: str) -> tuple[Flag, ...]:
    return tuple(map(Flag, names))


_NORMALIZED = "images are normalized as the model or its pretrained weights require"
_RESIZED = "images are resized as the model or its pretrained weights require"
_PURE = "parameters stay float32; use `amp_bf16` or `amp`"

FLAGS: tuple[Flag, ...] = (
    Flag(
        "train-data",
        text="by default `scenes`, images that fastclip generates; to evaluate without training, "
        "use `fastclip eval`",
    ),
    Flag(
        "train-data-upsampling-factors",
        text="how often an epoch passes over each source, so that it gets longer; in open_clip, "
        "the weights with which shards are drawn",
    ),
    *_same("val-data"),
    Flag("train-num-samples", text="at most as many as there are"),
    Flag("val-num-samples", text="evaluates the first samples of `--val-data`"),
    Flag("dataset-type", text="also `coco`, `imagefolder`, `scenes`, `collages`"),
    Flag(
        "dataset-resampled",
        "refused",
        "an epoch has every sample once, in an order that resumes exactly; "
        "`--train-data-upsampling-factors` has some sources more often",
    ),
    *_same("csv-separator", "csv-img-key", "csv-caption-key"),
    *_same("imagenet-val", "imagenet-v2"),
    Flag("cache-dir", text="for remote shards; models are downloaded to `HF_HOME`"),
    Flag("logs", refused={"none": "a run is always written; give a folder"}),
    Flag("log-local", "no effect", "only the first process writes the log"),
    *_same("name"),
    Flag("workers", text="by default, the process's share of the cores, at most 4"),
    Flag("batch-size", text="128 by default, not 64"),
    *_same("epochs"),
    *_same("epochs-cooldown"),
    Flag("lr", text="5e-4 by default for every model"),
    Flag("beta1", text="0.9 by default for every model"),
    Flag(
        "beta2",
        text="0.98 by default for every model; open_clip has 0.999 for those without ViT in "
        "their names",
    ),
    Flag(
        "eps",
        text="1e-6 by default for every model; open_clip has 1e-8 for those without ViT in "
        "their names",
    ),
    *_same("wd"),
    *_same("momentum"),
    Flag("warmup", text="a warm-up longer than the run is cut to a tenth of it"),
    Flag("opt", "renamed", "also `apex-adamw`, `apex-lamb`", becomes=("--optimizer",)),
    Flag(
        "use-bn-sync",
        "refused",
        "each process normalizes by its own batch, as in open_clip without the flag; use a vision "
        "transformer",
    ),
    Flag("skip-scheduler", "renamed", becomes=("--lr-scheduler=const", "--warmup=0")),
    Flag("lr-scheduler", text="also `wsd`"),
    *_same("lr-cooldown-end", "lr-cooldown-power"),
    Flag("save-frequency", refused={"0": "give the number of --epochs to save the last one alone"}),
    Flag(
        "save-most-recent", "no effect", "the newest checkpoint is kept; `--resume latest` finds it"
    ),
    Flag(
        "zeroshot-frequency",
        text="1 by default, not 2",
        refused={"0": "leave out `--zeroshot-data` and `--imagenet-val`"},
    ),
    Flag("val-frequency", refused={"0": "leave out `--val-data`"}),
    Flag(
        "resume",
        text="only checkpoints of fastclip; of one of open_clip, `--pretrained` takes the weights",
    ),
    Flag(
        "precision",
        text="`amp_bf16` by default, not `amp`",
        values={"amp_bfloat16": "amp_bf16"},
        refused=dict.fromkeys(("bf16", "fp16", "pure_bf16", "pure_fp16"), _PURE),
    ),
    Flag("model", text="by default `RN10t-64`, a small model"),
    Flag("pretrained", text="also takes a run directory or a checkpoint", values={"": "None"}),
    Flag(
        "pretrained-image",
        "refused",
        "use `--finetune` with the checkpoint or run directory that has the image tower",
    ),
    *_same("lock-image"),
    Flag("lock-image-unlocked-groups", text="also for open_clip's own ResNets"),
    *_same("lock-image-freeze-bn-stats"),
    Flag("image-mean", "refused", _NORMALIZED),
    Flag("image-std", "refused", _NORMALIZED),
    Flag("image-interpolation", "refused", _RESIZED),
    Flag("image-resize-mode", "refused", _RESIZED),
    Flag("aug-cfg", "refused", "use `--aug-scale 0.4 1.0`, `--aug-flip 0.5` or `--augment strong`"),
    *_same("grad-checkpointing"),
    Flag("local-loss", text="changes nothing: the processes always share the work"),
    Flag("gather-with-grad", text="changes nothing: the gradient is always that of the full batch"),
    Flag("force-context-length", "refused", _CONFIG.format('`"context_length"` in `"text_cfg"`')),
    Flag("force-image-size", "refused", _CONFIG.format('`"image_size"` in `"vision_cfg"`')),
    Flag("force-quick-gelu", "refused", _CONFIG.format('`"quick_gelu": true`')),
    Flag("force-patch-dropout", "refused", _CONFIG.format('`"patch_dropout"` in `"vision_cfg"`')),
    Flag("force-custom-text", "refused", _CONFIG.format('`"custom_text": true`')),
    Flag("torchscript", "refused", "use `--torchcompile`"),
    *_same("torchcompile"),
    Flag("trace", "refused", "use `--torchcompile`"),
    Flag("accum-freq", text="the gradient is exactly that of the whole batch"),
    Flag("device", text="`auto` by default: the GPU if there is one"),
    Flag("dist-url", "refused", _LAUNCHER),
    Flag("dist-backend", "refused", "it follows `--device`: NCCL for GPUs, Gloo for CPUs"),
    Flag(
        "report-to",
        text="`tensorboard` by default",
        values={"all": "tensorboard,wandb", "": "none"},
    ),
    *_same("wandb-notes"),
    Flag("wandb-project-name", text="`fastclip` by default, not `open-clip`"),
    Flag("debug", "no effect", "`--log-every-n-steps 1` writes a line of metrics for every step"),
    Flag(
        "copy-codebase",
        "refused",
        "the run directory has all settings in `config.yaml`; to fix the code, pin its version",
    ),
    Flag("horovod", "refused", "use torchrun"),
    Flag(
        "ddp-static-graph",
        "no effect",
        "backward passes differ: only the last micro-batch of a step is reduced",
    ),
    Flag(
        "no-set-device-rank",
        "refused",
        "leave `CUDA_VISIBLE_DEVICES` as it is: each process uses the GPU of its `LOCAL_RANK`",
    ),
    *_same("seed", "grad-clip-norm"),
    *_same("lock-text", "lock-text-unlocked-layers"),
    Flag(
        "lock-text-freeze-layer-norm",
        text="only for Hugging Face towers; in others, layer norms are always frozen",
    ),
    Flag("log-every-n-steps", text="10 by default, not 100"),
    Flag("coca-caption-loss-weight", "refused", _COCA),
    Flag("coca-contrastive-loss-weight", "refused", _COCA),
    Flag("remote-sync", "refused", _SYNC),
    Flag("remote-sync-frequency", "refused", _SYNC),
    Flag("remote-sync-protocol", "refused", _SYNC),
    *_same("delete-previous-checkpoint"),
    Flag(
        "distill-model",
        text="also with `--accum-freq`; for stored features, use `--distill-embeddings`",
    ),
    *_same("distill-pretrained"),
    Flag(
        "use-bnb-linear", "refused", "int8 layers are not trained here; use `--precision amp_bf16`"
    ),
    *_same("siglip"),
    Flag(
        "loss-dist-impl",
        text="`gather` by default, not `bidir`; also `ring`, which `bidir` and `shift` stand for",
    ),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}


def is_foreign(name: str) -> bool:
    """Whether a name, with dashes or underscores, is a flag in open_clip and not here."""
    flag = _BY_NAME.get(name.replace("_", "-"))
    return flag is not None and flag.status != "same"


def adapted(arguments: Sequence[str]) -> list[str]:
    """Arguments with open_clip's flags and values under the names that they have here.

    Raises:
        ValueError: some are refused; the message says of each what to do instead.
    """
    found: list[str] = []
    refused: list[str] = []
    # what a switch stands for wins over a flag beside it, as in open_clip
    last: list[str] = []
    for flag, argument, value in _split(arguments):
        if flag is None:
            found.append(argument)
            continue
        if flag.status == "refused":
            refused.append(
                f"--{flag.name} is open_clip's and not a flag of fastclip train: {_bare(flag.text)}"
            )
            continue
        if flag.status == "no effect":
            note(f"--{flag.name} has no effect here: {_bare(flag.text)}")
            continue
        reason = flag.refused.get((value or "").lower())
        if reason is not None:
            refused.append(f"--{flag.name} {value} is open_clip's: {_bare(reason)}")
            continue
        if value is None and flag.becomes:
            last += flag.becomes
            continue
        name = flag.becomes[-1] if flag.becomes else argument
        # as one, since a value may begin with a dash
        found.append(name if value is None else f"{name}={flag.values.get(value, value)}")
    if refused:
        # a line each, and each once
        raise ValueError("\n".join(dict.fromkeys(refused)))
    return found + last


def _bare(text: str) -> str:
    return text.replace("`", "")


def _split(arguments: Sequence[str]) -> Iterator[tuple[Flag | None, str, str | None]]:
    """Each argument, with the flag of the table that it is, and that one's single value."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        flag = _BY_NAME.get(name[2:].replace("_", "-")) if name.startswith("--") else None
        if flag is None:
            yield None, argument, None
        elif equals:
            yield flag, name, value
        elif rest and not rest[0].startswith("-"):
            yield flag, name, rest.pop(0)
        else:
            yield flag, name, None
