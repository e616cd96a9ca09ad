"""What the flags say of the system that is trained: objective, heads, towers."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

from fastclip.flags import flag

Options = TypeVar("Options", bound="SystemOptions")

_Language = Literal["clip", "slip", "siamlip", "byolip", "barlip", "swalip", "rocket", "uniclip"]
Objective = Literal[_Language, "classify", "simclr"]

# with a weak view of image and text, and strong ones besides
CROSSED = ("siamlip", "byolip", "barlip", "swalip", "rocket")
_STRONG_VIEWS = {"slip": 2, "uniclip": 2, "simclr": 2, **dict.fromkeys(CROSSED, 2)}

_PROJECTED = ("siamlip", "byolip", "barlip")
# the objectives that an option is for, where it is not for all
_USERS: dict[str, tuple[str, ...]] = {
    "strong_views": tuple(_STRONG_VIEWS),
    "head_width": ("uniclip", "slip", *CROSSED),
    "head_hidden": CROSSED,
    "separate_heads": CROSSED,
    **dict.fromkeys(
        ("projector_hidden", "projector_width"), ("slip", "simclr", *_PROJECTED, "swalip")
    ),
    **dict.fromkeys(("prototypes", "prototypes_frozen_steps"), ("swalip",)),
    "separate_projectors": _PROJECTED,
    "extra_weight": ("slip", "swalip", *_PROJECTED),
    # swalip's targets are soft already, slip has no pairs of strong views
    "label_smoothing": ("clip", "classify", "rocket", *_PROJECTED),
    **dict.fromkeys(
        ("pair_loss", "pair_weight", "augmentation_encoder", "shared_similarity"), ("uniclip",)
    ),
    "text_dropout": CROSSED,
    "hard_negatives": ("clip",),
    **dict.fromkeys(("text_lm", "lock_text"), ("clip", "uniclip", "slip", *CROSSED)),
    **dict.fromkeys(
        ("classes", "label_source", "label_case_sensitive", "classifier"), ("classify",)
    ),
}
_FROM_ZERO = (
    "strong_views",
    "lock_image_unlocked_groups",
    "lock_text_unlocked_layers",
    "prototypes_frozen_steps",
    "text_lm_cache_bytes",
    "hard_negatives",
)
# what the flags that begin so are for
_PREFIXES = {
    "text_lm_": "text_lm",
    "lock_image_": "lock_image",
    "lock_text_": "lock_text",
    "prototypes_": "prototypes",
}


@dataclass(frozen=True)
class SystemOptions:
    """The fields are the flags of the same names.

    Raises:
        ValueError: values out of range, or that exclude each other.
    """

    objective: Objective = flag("clip", defines_run=True)
    """clip (the sigmoid loss with --siglip); slip, siamlip, byolip, barlip, swalip: CLIP with an
    image-image or non-contrastive term; rocket: CLIP-Rocket; uniclip: UniCLIP; without texts:
    classify (supervised by labels) and simclr."""
    strong_views: int | None = flag(None, defines_run=True)
    """Number of strongly augmented views of each image, besides the weak one; the objectives from
    siamlip to rocket have as many of each text. By default 2 if the objective has any."""
    head_width: int | None = flag(None, defines_run=True)
    """Width of the heads' output; by default that of the towers' features."""
    head_hidden: int = flag(4096, defines_run=True)
    """Width of the hidden layers of MLP heads."""
    separate_heads: bool = flag(True, defines_run=True)
    """Separate heads for strong views; without, one linear head per modality for all views."""
    projector_hidden: int | None = flag(None, defines_run=True)
    """Width of the hidden layers of the projectors of slip, simclr and the added terms; by default
    as in the paper."""
    projector_width: int | None = flag(None, defines_run=True)
    """Width of the projectors' output; by default as in the paper."""
    separate_projectors: bool = flag(False, defines_run=True)
    """Separate projectors for strong views."""
    prototypes: int | None = flag(None, defines_run=True)
    """swalip: number of learned prototypes, to which the weak pair is assigned, through projectors;
    there are then no strong views. By default strong views are assigned to those of the other
    modality."""
    prototypes_frozen_steps: int = flag(0, defines_run=True)
    """With --prototypes: number of steps at the start of a run in which they are not updated."""
    extra_weight: float | None = flag(None, defines_run=True, heading="loss")
    """Weight of the term that is added to the CLIP loss; by default as in the paper: 0.2 for
    swalip, 1 for the others."""
    text_dropout: float = flag(0.0, defines_run=True)
    """Dropout in front of each layer of the text tower, for strong views, in training;
    --grad-checkpointing is then for the image tower alone."""
    label_smoothing: float = flag(0.0, defines_run=True, heading="loss")
    """Mass of the target that is spread over all candidates; for siamlip to rocket, in the loss of
    the strong views."""

    pair_loss: Literal["mp-nce", "info-nce", "mil-nce", "sup-con"] = flag(
        "mp-nce", defines_run=True, heading="loss"
    )
    """uniclip: loss over views and texts. info-nce compares each pair of blocks separately; mil-nce
    sums an anchor's positives inside the logarithm; sup-con has positives in each other's
    denominators, and a single scale."""
    pair_weight: tuple[float, float, float] | None = flag(None, defines_run=True, heading="loss")
    """uniclip with mp-nce or info-nce: weights of image-image, image-text and text-text positives;
    by default each kind contributes equally."""
    augmentation_encoder: bool = flag(True, defines_run=True)
    """uniclip: the image head receives the augmentation parameters of each view."""
    shared_similarity: bool = flag(False, defines_run=True, heading="loss")
    """uniclip: a single temperature and offset for all pairs instead of one for each kind."""

    hard_negatives: int = flag(0, defines_run=True, heading="loss")
    """False captions per image: further negatives of all images (NegCLIP); for clip."""

    text_lm: str | None = flag(None, defines_run=True)
    """Language model of Hugging Face, by name or folder, which replaces the text tower of --model.
    All but its last layers are frozen; those attend in both directions."""
    text_lm_unfrozen: int = flag(4, defines_run=True)
    """Number of last layers of --text-lm that are trained."""
    text_lm_pooling: Literal["mean", "last"] = flag("mean", defines_run=True)
    """Text feature from --text-lm's states: the mean of all tokens, or the last token."""
    text_lm_cache_bytes: int = flag(0, defines_run=True)
    """Maximum bytes of host memory for a cache of the frozen layers' states, by text."""
    context_length: int | None = flag(None, defines_run=True)
    """Tokens that texts for --text-lm are cut to; by default 128, or the model's maximum if it is
    lower. Other text towers have theirs in --model's config."""
    lock_image: bool = flag(False, defines_run=True)
    """Freeze the image tower."""
    lock_image_unlocked_groups: int = flag(0, defines_run=True)
    """With --lock-image: number of last groups of layers that are still trained."""
    lock_image_freeze_bn_stats: bool = flag(False, defines_run=True)
    """With --lock-image: freeze the running statistics of batch normalization too."""
    lock_text: bool = flag(False, defines_run=True)
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = flag(0, defines_run=True)
    """With --lock-text: number of last groups of layers that are still trained; the projection is
    one, each layer before it another."""
    lock_text_freeze_layer_norm: bool = flag(False, defines_run=True)
    """With --lock-text: freeze the layer norms of a Hugging Face text tower too; those of other
    towers are frozen in any case."""

    classes: str | None = flag(None, defines_run=True)
    """classify: file of class names, one per line in the order of the labels."""
    label_source: Literal["cls", "text"] = flag("cls", defines_run=True)
    """classify: labels from the data (KEY.cls, folders), or from class names found in captions;
    samples without a label are left out of the loss."""
    label_case_sensitive: bool = flag(False, defines_run=True)
    """classify: match class names in captions case-sensitively."""
    classifier: Literal["linear", "prototype", "zeroshot"] = flag("linear", defines_run=True)
    """classify: linear, with a bias; prototype: cosine of the features and a vector per class,
    times a learned scale; zeroshot: prototype, initialized with the class names' text features of
    --finetune's model."""
    finetune: str | None = flag(None, defines_run=False)
    """Run or checkpoint, of any objective, to initialize the image tower from."""

    def __post_init__(self) -> None:
        objective = self.objective
        for field in fields(SystemOptions):
            value = getattr(self, field.name)
            flag = "--" + field.name.replace("_", "-")
            if value == field.default:
                continue
            users = _USERS.get(field.name)
            if users is not None and objective not in users:
                raise ValueError(f"{flag} is for {', '.join(users)}, not {objective}; leave it out")
            for prefix, needed in _PREFIXES.items():
                if field.name.startswith(prefix) and not getattr(self, needed):
                    raise ValueError(f"{flag} needs --{needed.replace('_', '-')}; leave it out")
            # fractions have bounds of their own
            if isinstance(value, int) and not isinstance(value, bool):
                least = 0 if field.name in _FROM_ZERO else 1
                if value < least:
                    raise ValueError(f"{flag} is {value}; give at least {least}")
        if self.prototypes is not None:
            if self.strong:
                raise ValueError(
                    f"--strong-views is {self.strong}; swalip has none with --prototypes, give 0"
                )
        elif objective == "swalip" and (self.projector_hidden or self.projector_width):
            raise ValueError(
                "--projector-hidden, --projector-width: swalip has projectors only with "
                "--prototypes; leave them out"
            )
        elif objective in ("slip", "simclr", "swalip") and self.strong != 2:
            raise ValueError(f"--strong-views is {self.strong}; {objective} contrasts 2")
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"--text-dropout is {self.text_dropout}; give one in [0, 1)")
        if self.text_dropout and not self.strong:
            raise ValueError(f"--text-dropout: {objective} has no strong views here; leave it out")
        if self.text_dropout and self.text_lm is not None:
            raise ValueError("--text-dropout is for open_clip's text towers; leave out --text-lm")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing is {self.label_smoothing}; give one in [0, 1)")
        if self.label_smoothing and objective in CROSSED and not self.strong:
            raise ValueError(
                f"--label-smoothing: without strong views {objective} has no pairs of them to "
                "smooth; leave it out"
            )
        if self.extra_weight is not None and not 0 < self.extra_weight < math.inf:
            raise ValueError(f"--extra-weight is {self.extra_weight}; give a positive number")
        if self.lock_text and self.text_lm is not None:
            raise ValueError(
                "--lock-text: of --text-lm the last --text-lm-unfrozen layers are trained; leave "
                "--lock-text out"
            )
        if self.context_length is not None and self.text_lm is None:
            raise ValueError(
                "--context-length is for --text-lm; of other text towers it is in --model's config"
            )
        if objective == "classify" and self.label_source == "text" and self.classes is None:
            raise ValueError("--label-source text finds class names: give --classes FILE")
        if self.classifier == "zeroshot" and not self.finetune:
            raise ValueError(
                "--classifier zeroshot begins with the text features of a model: give --finetune"
            )

    def lasting(self: Options) -> Options:
        """The same model, without what its training begins with."""
        classifier = "prototype" if self.classifier == "zeroshot" else self.classifier
        return replace(
            self,
            finetune=None,
            classifier=classifier,
            lock_image=False,
            lock_image_unlocked_groups=0,
            lock_image_freeze_bn_stats=False,
            lock_text=False,
            lock_text_unlocked_layers=0,
            lock_text_freeze_layer_norm=False,
            prototypes_frozen_steps=0,
        )

    @property
    def strong(self) -> int:
        """Strong views of each image."""
        if self.strong_views is not None:
            return self.strong_views
        return 0 if self.prototypes is not None else _STRONG_VIEWS.get(self.objective, 0)

    @property
    def views(self) -> tuple[int, int]:
        """Image views and text views of each sample, the weak one included."""
        if self.objective == "simclr":
            return self.strong, 0
        if self.objective == "classify":
            return 1, 0
        return 1 + self.strong, 1 + self.strong if self.objective in CROSSED else 1
