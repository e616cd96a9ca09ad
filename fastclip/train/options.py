"""The sections of the training configuration; their fields are the flags of the same names.

What concerns one section alone is checked here, what concerns several in `config.py`.
"""

from dataclasses import dataclass, fields
from typing import Literal

from fastclip.data.options import DataOptions, parse_sources
from fastclip.device import own_cores
from fastclip.flags import check_least, check_positive, flag, flag_name
from fastclip.functional.global_contrastive import GAMMAS, RHO, check_options, check_variant
from fastclip.models.options import SystemOptions
from fastclip.ops.backend import IMPLEMENTATIONS


@dataclass(frozen=True)
class TrainingDataOptions(DataOptions):
    """What to train on, and how it is read and augmented."""

    train_data: str = flag("scenes", defines_run=True)
    """Shards, e.g. '/data/{00000..00041}.tar' or 's3://bucket/{000..041}.tar'; a CSV or COCO
    captions file; a folder with a folder of images a class; 'synthetic'; 'scenes', or a variant
    like 'scenes:caption=dense,shift=style'; 'collages', or a variant like
    'collages:objects=2,photos=FOLDER'. Several of one type are joined by '::'."""
    train_data_upsampling_factors: str | None = flag(None, defines_run=True)
    """How many times an epoch passes over each pattern of --train-data, e.g. 1::2.5."""
    val_data: str | None = flag(None, defines_run=False, heading="evaluation")
    """As --train-data; evaluated every --val-frequency epochs."""
    val_image_root: str | None = flag(None, defines_run=False, heading="evaluation")
    """As --image-root, for --val-data."""
    zeroshot_data: tuple[str, ...] = flag((), defines_run=False, heading="evaluation")
    """NAME=DATA of each labeled source on which zero-shot accuracy is measured while training,
    every --zeroshot-frequency epochs: a folder with a folder of images a class, or shards with
    classes.txt beside them. The metrics are called zeroshot/NAME/acc1 and so on."""
    val_num_samples: int | None = flag(None, defines_run=False, heading="evaluation")
    """Evaluate on the first so many samples of --val-data alone."""
    imagenet_val: str | None = flag(None, defines_run=False, heading="evaluation")
    """open_clip's flag: ImageNet's validation images in folders called by WordNet ids; as
    --zeroshot-data imagenet=DATA, with the class names and templates of CLIP's authors."""
    imagenet_v2: str | None = flag(None, defines_run=False, heading="evaluation")
    """As --imagenet-val, for ImageNetV2, whose folders are called 0 to 999; as --zeroshot-data
    imagenet-v2=DATA."""
    retrieval_data: tuple[str, ...] = flag((), defines_run=False, heading="evaluation")
    """NAME=DATA of each source on which retrieval is measured while training, every
    --zeroshot-frequency epochs; DATA as for --train-data. The metrics are called
    retrieval/NAME/text_retrieval_recall@1 and so on."""
    train_num_samples: int | None = flag(None, defines_run=True)
    """Samples an epoch; all by default (20,000 for scenes and collages, 1,000 for synthetic)."""
    shuffle_window: int = flag(32768, defines_run=True)
    """Samples shuffled together after the shards were. Of a million, a loader process keeps the
    places of two windows in memory, about 1.2 GB."""
    data_backend: Literal["auto", "dali", "cpu"] = flag("auto", defines_run=True)
    """What decodes and augments images. dali: DALI, on the GPU if there is one. cpu: the loader
    processes. auto uses DALI if it is installed and there is a GPU; on a CPU DALI is slower."""
    augment: Literal["crop", "weak", "strong"] | None = flag(None, defines_run=True)
    """crop: a random crop, of 0.9 of the image or more. weak, strong: CLIP-Rocket's views, crops of
    0.5 and of 0.08 or more; the strong one has flip, color jitter, grayscale and blur. By default
    crop, or weak where --objective has strong views besides."""
    aug_scale: tuple[float, float] | None = flag(None, defines_run=True)
    """Least and greatest share of the image that a random crop keeps; overrides --augment."""
    strong_scale: tuple[float, float] | None = flag(None, defines_run=True)
    """As --aug-scale, for the strong views of --objective."""
    aug_flip: float | None = flag(None, defines_run=True)
    """Probability of a horizontal flip; overrides --augment."""
    aug_blur: float | None = flag(None, defines_run=True)
    """Probability of a blur in every strong view, by default 0.5. Its standard deviation is up to 2
    pixels of the model's input, which hides what small images show: give 0 for inputs far below
    224."""
    sentence_sampling: bool = flag(False, defines_run=True)
    """Train on a random part of a caption's sentences, in their order."""
    text_augment: Literal["none", "weak", "strong"] = flag("none", defines_run=True)
    """weak: stop words are often removed. strong: then a synonym, a swap or a deletion as well. For
    the strong views of --objective, set --strong-text-augment."""
    strong_text_augment: Literal["none", "weak", "strong"] | None = flag(None, defines_run=True)
    """As --text-augment, for the texts of the strong views of --objective; by default strong. Give
    none if a single word decides what a caption says, e.g. for class names in a template."""
    stop_word_rate: float = flag(0.8, defines_run=True)
    """Share of the augmented texts from which stop words are removed."""
    clean_captions: bool = flag(False, defines_run=True)
    """Resolve HTML entities and collapse white space before a text is augmented."""
    caption_views: Literal["single", "multi"] = flag("single", defines_run=True)
    """single: all of a sample's texts in a step are augmentations of one caption. multi: each is of
    a caption drawn for it, where a sample has several."""
    workers: int | None = flag(None, defines_run=False)
    """Processes that load data, of each training process; 0 loads in the training process itself.
    By default this process's share of the cores, at most 4. Does not change the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, shuffle_window=1, workers=0)
        check_positive(self, "train_num_samples", "val_num_samples")
        if not 0 <= self.stop_word_rate <= 1:
            raise ValueError(f"--stop-word-rate is {self.stop_word_rate}; give one in [0, 1]")
        if self.val_num_samples is not None and self.val_data is None:
            raise ValueError("--val-num-samples is for --val-data; leave it out")
        # reported now, not when they are opened
        _ = self.zeroshot_sources, self.retrieval_sources

    @property
    def zeroshot_sources(self) -> dict[str, str]:
        """What --zeroshot-data, --imagenet-val and --imagenet-v2 name, by name."""
        published = {"imagenet": self.imagenet_val, "imagenet-v2": self.imagenet_v2}
        imagenet = (f"{name}={data}" for name, data in published.items() if data is not None)
        return parse_sources((*imagenet, *self.zeroshot_data), "--zeroshot-data")

    @property
    def retrieval_sources(self) -> dict[str, str]:
        """What --retrieval-data names, by name."""
        return parse_sources(self.retrieval_data, "--retrieval-data")

    @property
    def evaluations(self) -> tuple[str, ...]:
        """How the names of metrics begin, for each source that is evaluated while training."""
        return (
            *(["val/"] if self.val_data else []),
            *(f"zeroshot/{name}/" for name in self.zeroshot_sources),
            *(f"retrieval/{name}/" for name in self.retrieval_sources),
        )

    @property
    def loader_processes(self) -> int:
        """What --workers is, or comes to on this machine."""
        if self.workers is not None:
            return self.workers
        return min(4, own_cores())


@dataclass(frozen=True)
class ModelOptions(SystemOptions):
    """What is trained: towers, objective, and how they are computed."""

    model: str = flag("RN10t-64", defines_run=True)
    """An open_clip model, a config shipped with fastclip, or a path to a JSON config."""
    pretrained: str | None = flag(None, defines_run=False)
    """Weights to start from: the name of open_clip weights, e.g. 'laion2b_s34b_b79k', or a path."""
    precision: Literal["fp32", "amp", "amp_bf16"] = flag(
        "amp_bf16", defines_run=True, heading="device"
    )
    """Precision of the towers: float32, float16 with a loss scale, or bfloat16. Parameters stay
    float32; with --deepspeed, the optimizer's copies of them do."""
    grad_checkpointing: bool = flag(False, defines_run=True, heading="device")
    """Recompute the towers' activations in the backward pass instead of keeping them."""
    torchcompile: bool = flag(False, defines_run=True, heading="device")
    """Compile the towers with torch.compile."""
    attention: Literal["tower", "auto", "triton", "sdpa", "flash", "reference"] = flag(
        "tower", defines_run=True, heading="device"
    )
    """tower: the towers' own attention. Otherwise fastclip's under the same weights, by the fastest
    implementation that was measured (auto) or the one named."""
    layer_norm: Literal["torch", "apex"] = flag("torch", defines_run=True, heading="device")
    """The towers' layer norms: torch's, or apex's fused one where NVIDIA's apex is installed."""


@dataclass(frozen=True)
class OptimOptions:
    """Batches, steps and updates."""

    batch_size: int = flag(128, defines_run=True)
    """Samples a micro-batch of one process; times --accum-freq and the processes, of a step."""
    global_batch: int | None = flag(None, defines_run=False)
    """Samples of a step, over all processes, that the other settings are meant for; recipes say it.
    A run with another number is warned, and trains."""
    accum_freq: int = flag(1, defines_run=True)
    """Micro-batches a step. Their gradient is exactly that of the whole batch, of every parameter;
    the towers run forward twice."""
    epochs: int = flag(32, defines_run=True, heading="schedule")
    """Passes over the data."""
    optimizer: str = flag("adamw", defines_run=True)
    """adamw: torch's fused AdamW. apex-adamw, apex-lamb: apex's FusedAdam and FusedLAMB, where
    NVIDIA's apex is installed. timm/NAME, e.g. timm/lion: one of timm's."""
    momentum: float | None = flag(None, defines_run=True)
    """With timm/NAME: the momentum of optimizers that have one, e.g. timm/sgd; by default 0.9."""
    lr: float = flag(5e-4, defines_run=True)
    """Learning rate after warm-up."""
    beta1: float = flag(0.9, defines_run=True)
    """Adam's first decay rate."""
    beta2: float = flag(0.98, defines_run=True)
    """Adam's second decay rate."""
    eps: float = flag(1e-6, defines_run=True)
    """Adam's epsilon."""
    wd: float = flag(0.2, defines_run=True)
    """Weight decay; norms, biases and the logit scale have none."""
    warmup: int = flag(10000, defines_run=True, heading="schedule")
    """Steps of linear warm-up."""
    lr_scheduler: Literal["cosine", "const", "const-cooldown", "wsd"] = flag(
        "cosine", defines_run=True, heading="schedule"
    )
    """Learning-rate schedule after warm-up: half a cosine; constant; constant with a cooldown at
    the end, in open_clip's form or (wsd: warmup, stable, decay) in that of Hagele et al. 2024."""
    epochs_cooldown: int | None = flag(None, defines_run=True, heading="schedule")
    """Epochs of the cooldown, the run's last ones; const-cooldown needs it, wsd has a fifth of the
    run without."""
    lr_cooldown_end: float = flag(0.0, defines_run=True, heading="schedule")
    """Learning rate at the end of the cooldown."""
    lr_cooldown_power: float | None = flag(None, defines_run=True, heading="schedule")
    """Exponent p of the cooldown, at the share x of its steps: const-cooldown falls as (1 - x)^p,
    by default 1, wsd as 1 - x^p, by default 0.5."""
    grad_clip_norm: float | None = flag(None, defines_run=True)
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema: float | None = flag(None, defines_run=True)
    """Keep an average of the weights that keeps this share of itself in each step, e.g. 0.999, and
    evaluate it too. byolip's teacher is this average, by default with 0.99."""
    seed: int = flag(0, defines_run=True)
    """Of the initial weights, the order of samples and the augmentation."""
    deterministic: bool = flag(False, defines_run=True)
    """Only algorithms that are bitwise reproducible, also on a GPU; slower there."""

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, accum_freq=1, epochs=1, lr=0, wd=0, warmup=0)
        check_positive(self, "grad_clip_norm", "global_batch")
        self._check_cooldown()
        self._check_optimizer()
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"--ema is {self.ema}; give one in [0, 1), e.g. 0.999")

    def _check_optimizer(self) -> None:
        own = "adamw", "apex-adamw", "apex-lamb"
        if self.optimizer not in own and not self.optimizer.startswith("timm/"):
            raise ValueError(
                f"--optimizer {self.optimizer} is unknown; use one of {', '.join(own)} or timm/NAME"
            )
        if self.momentum is not None and self.optimizer in own:
            raise ValueError(f"--momentum is for --optimizer timm/NAME, not {self.optimizer}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum is {self.momentum}; give one in [0, 1)")

    def _check_cooldown(self) -> None:
        names = "epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"
        given = [each for each in fields(self) if each.name in names]
        for each in given:
            if getattr(self, each.name) != each.default and not self.cools_down:
                raise ValueError(
                    f"{flag_name(each.name)} is for --lr-scheduler const-cooldown and wsd, not "
                    f"{self.lr_scheduler}; leave it out"
                )
        check_least(self, lr_cooldown_end=0)
        check_positive(self, "epochs_cooldown", "lr_cooldown_power")
        if self.lr_scheduler == "const-cooldown" and self.epochs_cooldown is None:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown N")
        if (self.epochs_cooldown or 0) > self.epochs:
            raise ValueError(
                f"--epochs-cooldown is {self.epochs_cooldown}; give at most --epochs, which is "
                f"{self.epochs}"
            )
        if self.lr_cooldown_end > self.lr:
            raise ValueError(
                f"--lr-cooldown-end is {self.lr_cooldown_end:g}; give at most --lr, which is "
                f"{self.lr:g}"
            )

    @property
    def cools_down(self) -> bool:
        """Whether the learning rate is constant until a cooldown."""
        return self.lr_scheduler in ("const-cooldown", "wsd")

    def step_samples(self, processes: int) -> int:
        """Samples of a step over all processes."""
        return self.batch_size * self.accum_freq * processes


# the variants of the global loss that an option is for, where it is not for all
_USERS = {
    "global_gamma_epochs": ("v1", "v3"),
    "global_full_first_epoch": ("sogclr",),
    "global_rho": ("v3",),
    "global_temperature_lr": ("v3",),
}


@dataclass(frozen=True)
class LossOptions:
    """What the loss is, how it is computed, and how processes share it."""

    loss: Literal["objective", "global"] = flag("objective", defines_run=True)
    """objective: that of --objective. global: SogCLR's or FastCLIP's, against all of the data by an
    average for each sample; for --objective clip."""
    global_variant: str = flag("v3", defines_run=True)
    """With --loss global: sogclr; v1 or v3, FastCLIP with a constant or a learned temperature."""
    global_gamma: float | None = flag(None, defines_run=True)
    """With --loss global: share of an average that a step replaces, in v1 and v3 at the end of its
    schedule; by default 0.8 for sogclr, 0.2 for v1 and v3."""
    global_gamma_epochs: int | None = flag(None, defines_run=True)
    """With v1 and v3: epochs over which gamma falls from 1; by default half of --epochs."""
    global_full_first_epoch: bool = flag(False, defines_run=True)
    """With sogclr: gamma is 1 in the first epoch, as it is in v1 and v3."""
    global_rho: float = flag(RHO, defines_run=True)
    """With v3: how strongly a low temperature is resisted."""
    global_temperature: float | None = flag(None, defines_run=True)
    """With --loss global: the temperature, in v3 the one to begin with; by default the model's."""
    global_temperature_lr: float | None = flag(None, defines_run=True)
    """With v3: learning rate of the logarithm of the temperature, scheduled as --lr; by default
    --lr."""
    group_duplicates: Literal["excluded", "positive"] | None = flag(None, defines_run=True)
    """Duplicates in a batch, of all processes: no negatives of each other, or positives; for
    --objective clip. By default they are negatives."""
    group_by: Literal["caption", "image"] = flag("caption", defines_run=True)
    """With --group-duplicates: duplicates have the same text, or the same image file."""
    distill_model: str | None = flag(None, defines_run=True)
    """Teacher whose softmax over a batch's pairs is a target besides the pairs themselves: as
    --model, of the same image size and tokens."""
    distill_pretrained: str | None = flag(None, defines_run=True)
    """The teacher's weights, as --pretrained."""
    distill_embeddings: tuple[str, str] | None = flag(None, defines_run=True)
    """Instead of --distill-model: the teacher's stored features of images and of texts, .npy files
    of one row a sample in the order of the data, e.g. 'images-{000..041}.npy' 'texts.npy'."""
    distill_shards: bool = flag(False, defines_run=True)
    """Instead of --distill-model: the shards of --train-data hold the teacher's features of every
    sample, KEY.teacher_image.npy and KEY.teacher_text.npy, as `fastclip embed shards` writes
    them."""
    distill_logit_scale: float | None = flag(None, defines_run=True)
    """With --distill-embeddings or --distill-shards: the teacher's logit scale, exponentiated, e.g.
    100."""
    distill_weight: float = flag(1.0, defines_run=True)
    """Weight of the distillation term, which is added to the contrastive one."""
    siglip: bool = flag(False, defines_run=True)
    """The sigmoid loss; the model gets a logit bias."""
    local_loss: bool = flag(False, defines_run=False)
    """open_clip's flag; the work is shared among the processes in any case."""
    gather_with_grad: bool = flag(True, defines_run=False)
    """open_clip's flag; without it the gradient would not be the full batch's."""
    loss_dist_impl: Literal["gather", "ring", "bidir", "shift", "reduce"] = flag(
        "gather", defines_run=True
    )
    """How processes exchange features: all at once (gather; reduce), or one process's after the
    other in less memory (ring; bidir, shift)."""
    loss_backend: str = flag("auto", defines_run=True)
    """Implementation of the loss: auto, triton, cuda, cpp, torch or reference. Not for
    --objective classify."""

    def __post_init__(self) -> None:
        self._check_global()
        self._check_distillation()
        if not self.gather_with_grad:
            raise ValueError(
                "--no-gather-with-grad is not the full batch's gradient; leave the flag out"
            )
        if self.group_by != "caption" and self.group_duplicates is None:
            raise ValueError("--group-by is for --group-duplicates; leave it out")
        known = [implementation.name for implementation in IMPLEMENTATIONS["similarity"]]
        if self.loss_backend not in ["auto", *known]:
            raise ValueError(
                f"--loss-backend {self.loss_backend} is unknown; use auto or {', '.join(known)}"
            )

    def _check_distillation(self) -> None:
        """Refuse half of a teacher, and two."""
        if (self.distill_model is None) != (self.distill_pretrained is None):
            raise ValueError(
                "--distill-model and --distill-pretrained name a teacher together; give both"
            )
        if len(self.teachers) > 1:
            raise ValueError(f"{' and '.join(self.teachers)} are several teachers; give one")
        if self.distill_stored and self.distill_logit_scale is None:
            name = "--distill-shards" if self.distill_shards else "--distill-embeddings"
            raise ValueError(f"{name} needs --distill-logit-scale, the teacher's; give it")
        if self.distill_logit_scale is not None and not self.distill_stored:
            raise ValueError(
                "--distill-logit-scale is for --distill-embeddings and --distill-shards; leave it "
                "out"
            )
        if self.distill_weight != 1 and not self.distills:
            raise ValueError(
                "--distill-weight is for --distill-model, --distill-embeddings and "
                "--distill-shards; leave it out"
            )
        check_positive(self, "distill_logit_scale", "distill_weight")

    @property
    def teachers(self) -> list[str]:
        """The flags that name a teacher."""
        given = {
            "--distill-model": self.distill_model is not None,
            "--distill-embeddings": self.distill_embeddings is not None,
            "--distill-shards": self.distill_shards,
        }
        return [name for name, is_given in given.items() if is_given]

    @property
    def distills(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.teachers)

    @property
    def distill_stored(self) -> bool:
        """Whether there is one whose features are stored."""
        return self.distill_embeddings is not None or self.distill_shards

    def _check_global(self) -> None:
        """Refuse options of global losses that are out of range, or that nothing would use."""
        given = [each for each in fields(self) if getattr(self, each.name) != each.default]
        for name in [each.name for each in given if each.name.startswith("global_")]:
            if self.loss != "global":
                raise ValueError(f"{flag_name(name)} is for --loss global; leave it out")
            users = _USERS.get(name, (self.global_variant,))
            if self.global_variant in GAMMAS and self.global_variant not in users:
                raise ValueError(
                    f"{flag_name(name)} is for {', '.join(users)}, not {self.global_variant}; "
                    "leave it out"
                )
        check_positive(self, "global_gamma_epochs", "global_temperature_lr")
        try:
            check_variant(self.global_variant)
            gamma = 1.0 if self.global_gamma is None else self.global_gamma
            check_options(gamma, self.global_rho, eps=1.0)
        except ValueError as error:
            raise ValueError(f"--loss global: {error}") from None
        temperature = self.global_temperature
        if temperature is not None and not 0.01 <= temperature <= 1:
            raise ValueError(
                f"--global-temperature is {temperature}; give one from 0.01 to 1, which are the "
                "logit scales from 100 to 1"
            )


@dataclass(frozen=True)
class DistributedOptions:
    """Devices and processes."""

    device: str = flag("auto", defines_run=True)
    """"auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1"; with several processes each
    takes the GPU of its LOCAL_RANK."""
    fsdp: bool = flag(False, defines_run=True)
    """Train with torch's FSDP2, which shards parameters, gradients and optimizer."""
    deepspeed: bool = flag(False, defines_run=True)
    """Train with DeepSpeed's ZeRO, which shards optimizer, gradients and parameters."""
    deepspeed_config: str | None = flag(None, defines_run=True)
    """DeepSpeed's JSON file, or ds_zero1, ds_zero2, ds_zero3; "auto" there takes our flags."""
    local_rank: int | None = flag(None, defines_run=False, inherited=False)
    """Given by DeepSpeed's launcher; the environment says the same."""
    dead_rank_timeout: float = flag(60.0, defines_run=False)
    """Seconds without a heartbeat after which a rank counts as dead and the others end."""
    data_timeout: float = flag(1800.0, defines_run=False)
    """Seconds that a rank may wait for a batch before the run ends."""

    def __post_init__(self) -> None:
        if self.fsdp and (self.deepspeed or self.deepspeed_config):
            raise ValueError(
                "--fsdp and --deepspeed shard the same parameters; leave one out, and with --fsdp "
                "--deepspeed-config too"
            )
        if self.deepspeed_config and not self.deepspeed:
            raise ValueError(
                f"--deepspeed_config {self.deepspeed_config} is for --deepspeed; add that flag, or "
                "leave this one out"
            )
        check_least(self, dead_rank_timeout=5, data_timeout=1)

    @property
    def sharded(self) -> bool:
        """Whether the trained model is no whole one that could be evaluated."""
        return self.fsdp or self.deepspeed


@dataclass(frozen=True)
class CheckpointOptions:
    """Saving and resuming."""

    resume: str | None = flag(None, defines_run=False, inherited=False)
    """"latest" (of the run called --name), a run directory, or a checkpoint. Flags that you leave
    out have the values of that run."""
    # a run directory may come from elsewhere: it does not vouch for itself
    trust_checkpoint: bool = flag(False, defines_run=False, inherited=False)
    """Resume from DeepSpeed's files, which are pickles: they can run any code when loaded."""
    save_frequency: int = flag(1, defines_run=False)
    """Epochs between checkpoints."""
    save_every_steps: int | None = flag(None, defines_run=False)
    """Steps between further checkpoints, of which the newest two are kept."""
    best_metric: str | None = flag(None, defines_run=False)
    """Metric of the evaluation by which the best epoch is found, which RUN@best loads: the lowest
    of a loss, the highest of all others. By default val/loss; of classifiers val/acc1."""
    save_all: bool = flag(False, defines_run=False)
    """Keep the checkpoints of all epochs. By default the newest and the best are kept."""
    delete_previous_checkpoint: bool = flag(False, defines_run=False)
    """Keep the newest epoch's checkpoint alone, not the best."""

    def __post_init__(self) -> None:
        if self.delete_previous_checkpoint and (self.save_all or self.best_metric):
            other = "--save-all" if self.save_all else f"--best-metric {self.best_metric}"
            raise ValueError(
                f"--delete-previous-checkpoint keeps the newest alone, against {other}; leave one "
                "of them out"
            )
        check_least(self, save_frequency=1)
        check_positive(self, "save_every_steps")


@dataclass(frozen=True)
class LogOptions:
    """The run directory, metrics and evaluation."""

    name: str | None = flag(None, defines_run=False, inherited=False)
    """Name of the run directory under --logs; by default the time and the model."""
    logs: str = flag("logs", defines_run=False, inherited=False)
    """Directory that holds the run directories."""
    val_frequency: int = flag(1, defines_run=False, heading="evaluation")
    """Epochs between evaluations on --val-data."""
    zeroshot_frequency: int = flag(1, defines_run=False, heading="evaluation")
    """Epochs between evaluations on --zeroshot-data, --imagenet-val and --retrieval-data."""
    log_every_n_steps: int = flag(10, defines_run=False)
    """Steps between lines of metrics."""
    log_sample_ids: bool = flag(False, defines_run=False)
    """Write the keys of each step's samples to samples.jsonl."""
    report_to: str = flag("tensorboard", defines_run=False)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, both joined by a comma, or
    none."""
    wandb_project_name: str = flag("fastclip", defines_run=False)
    """With --report-to wandb: the project there."""
    wandb_notes: str | None = flag(None, defines_run=False)
    """With --report-to wandb: notes on the run."""

    def __post_init__(self) -> None:
        check_least(self, val_frequency=1, zeroshot_frequency=1, log_every_n_steps=1)
        unknown = self.reporters - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(
                f"--report-to {self.report_to}: {', '.join(sorted(unknown))} is unknown; use "
                "tensorboard, wandb, tensorboard,wandb or none"
            )

    @property
    def reporters(self) -> set[str]:
        """The names in --report-to."""
        return set(self.report_to.replace("none", "").split(",")) - {""}
