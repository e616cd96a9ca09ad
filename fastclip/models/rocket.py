"""CLIP-Rocket and the improved baselines (Fini et al. 2023), and SLIP (Mu et al. 2022).

    rocket    CLIP on a weakly augmented pair and, behind heads of their own, on strong ones
    siamlip   + each modality predicts the other's projection
    byolip    + the same, of a teacher's projections
    barlip    + the modalities' projections have the identity as cross-correlation
    swalip    + soft assignments to the other modality, predicted from the other views
              or, with prototypes, to these, of the weak pair alone (its first version)
    slip      CLIP on the weak pair alone + SimCLR between two strong views of the image

View 0 of images and of texts is the weak one, those from 1 are the R strong ones.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.functional import clip_loss, nt_xent_loss
from fastclip.losses.non_contrastive import (
    cross_correlation_loss,
    prediction_loss,
    prototype_assignment_loss,
    swapped_assignment_loss,
)
from fastclip.models.options import SystemOptions
from fastclip.models.system import PREFIX, Criterion, Features, Modality, TwoTowers, View
from fastclip.models.text_dropout import TextDropout
from fastclip.nn.heads import MLPHead, linear_head
from fastclip.ops.checks import check_positive

MODALITIES: tuple[Modality, ...] = get_args(Modality)
SIMCLR_TEMPERATURE = PROTOTYPE_TEMPERATURE = 0.1
LOGIT_SCALE_BOUND = (0.0, math.log(100))


class Term(NamedTuple):
    """What is added to CLIP's loss: its weight, and its projectors' layers as of `MLPHead`."""

    weight: float
    widths: tuple[int, ...] = ()
    last_norm: str | None = None
    last_bias: bool = False


TERMS = {
    "slip": Term(1.0, (4096, 4096, 256), last_bias=True),
    "siamlip": Term(1.0, (2048, 128), "plain"),
    "byolip": Term(1.0, (2048, 128), "plain"),
    "barlip": Term(1.0, (3000, 3000, 8192), "affine"),
    # projectors are of the version with prototypes
    "swalip": Term(0.2, (2048, 128), last_bias=True),
}


class ViewHeads(nn.ModuleDict):
    """A head of each modality, and others for its strong views where `strong` makes them."""

    def __init__(
        self, every: Callable[[], nn.Module], strong: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__({modality: every() for modality in MODALITIES})
        if strong is not None:
            self.update({f"strong_{modality}": strong() for modality in MODALITIES})

    def head(self, view: View) -> nn.Module:
        """The head of a view."""
        strong = f"strong_{view.modality}"
        return self[strong] if view.number > 0 and strong in self else self[view.modality]

    def forward(self, features: Mapping[View, Tensor]) -> dict[View, Tensor]:
        """Every view through its head."""
        return {view: self.head(view)(rows) for view, rows in features.items()}


class RocketCriterion(Criterion):
    """(weak + R * strong) / (1 + R) + term_weight * term, weak and strong being CLIP's loss.

    strong is the mean over the R * R pairs of a strong image and a strong text view; a strong and
    a weak view are never contrasted. For slip there are no such pairs, and it is weak alone.

    Args:
        width: of the towers' features.
        term: None for CLIP-Rocket, or which of `TERMS` is added.
        strong_views: R; 2 for swalip and slip, 0 with prototypes. With 0 the loss is CLIP's on the
            weak pair.
        head_width: of the common space; by default `width`.
        head_hidden: of the strong views' MLP heads.
        separate_heads: whether strong views have heads and a scale of their own; if not, the linear
            heads and their scale serve all.
        projector_hidden, projector_width: of the term's projectors; by default as in `TERMS`.
        separate_projectors: whether strong views have projectors and predictors of their own.
        prototypes: for swalip: how many; None for assignments to the other modality's rows.
        term_weight: by default as in `TERMS`.
        label_smoothing: mass of the strong pairs' targets spread over all candidates.

    Raises:
        ValueError: an unknown term, a number of views that it has no use for, label smoothing
            without strong pairs or beside swalip's soft targets, prototypes of another term than
            swalip, a weight that is not positive.
    """

    def __init__(
        self,
        width: int,
        *,
        term: str | None = None,
        strong_views: int = 2,
        head_width: int | None = None,
        head_hidden: int = 4096,
        separate_heads: bool = True,
        projector_hidden: int | None = None,
        projector_width: int | None = None,
        separate_projectors: bool = False,
        prototypes: int | None = None,
        term_weight: float | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(term, strong_views, label_smoothing, prototypes)
        self.term, self.strong_views, self.label_smoothing = term, strong_views, label_smoothing
        strong = range(1, 1 if term == "slip" else 1 + strong_views)
        # of an image and a text view, the weak pair first
        self.pairs = [(View("image", 0), View("text", 0))]
        self.pairs += [(View("image", a), View("text", b)) for a in strong for b in strong]
        self.two_spaces = separate_heads and len(self.pairs) > 1

        output = width if head_width is None else head_width
        linear = functools.partial(linear_head, width, output)
        mlp = functools.partial(MLPHead, [width, head_hidden, head_hidden, output], last_bias=True)
        self.heads = ViewHeads(linear, mlp if self.two_spaces else None)
        self.weak_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.bounds = {"weak_logit_scale": LOGIT_SCALE_BOUND}
        if self.two_spaces:
            self.strong_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.1)))
            self.bounds["strong_logit_scale"] = LOGIT_SCALE_BOUND
        self.prototypes: nn.Linear | None = None
        if term is None:
            return
        self.term_weight = TERMS[term].weight if term_weight is None else term_weight
        check_positive("term_weight", self.term_weight)
        if term != "swalip" or prototypes is not None:
            widths = projector_hidden, projector_width, prototypes
            separate = separate_projectors and len(self.pairs) > 1
            self._make_projectors(width, TERMS[term], *widths, separate)

    def _make_projectors(
        self,
        width: int,
        term: Term,
        hidden: int | None,
        output: int | None,
        prototypes: int | None,
        separate: bool,
    ) -> None:
        *layers, last = term.widths
        hidden = layers[0] if hidden is None else hidden
        output = last if output is None else output
        widths = [width, *[hidden] * len(layers), output]
        norm, bias = term.last_norm, term.last_bias
        projector = functools.partial(MLPHead, widths, last_norm=norm, last_bias=bias)
        if self.term == "slip":
            self.projector = projector()
            return
        self.projectors = ViewHeads(projector, projector if separate else None)
        if prototypes is not None:
            self.prototypes = nn.Linear(output, prototypes, bias=False)
        if self.term in ("siamlip", "byolip"):
            predictor = functools.partial(MLPHead, [output, hidden, output], last_bias=True)
            self.predictors = ViewHeads(predictor, predictor if separate else None)

    def embed(self, view: View, rows: Tensor) -> Tensor:
        """A view's features, (N, width), in its common space, (N, head_width), normalized."""
        return F.normalize(self.heads.head(view)(rows), dim=-1)

    def forward(
        self,
        features: Features,
        *,
        targets: Mapping[View, Tensor] | None = None,
        backend: str = "auto",
        **exchange: Any,
    ) -> Tensor:
        """See `Criterion.forward`."""
        views = features.views()
        compared = dict.fromkeys(itertools.chain(*self.pairs))
        embedded = {view: self.embed(view, views[view]) for view in compared}
        loss = self._clip_loss(embedded, backend=backend, **exchange)
        if self.term is None:
            return loss
        if self.term == "slip":
            strong = (self.projector(rows) for rows in features.images[1:])
            first, second = (F.normalize(rows, dim=-1) for rows in strong)
            term = nt_xent_loss(first, second, SIMCLR_TEMPERATURE, backend=backend, **exchange)
        elif self.prototypes is not None:
            term = self._prototype_loss(views, self.prototypes, **exchange)
        elif self.term == "swalip":
            images, texts = ([embedded[View(m, v)] for v in (1, 2)] for m in MODALITIES)
            term = swapped_assignment_loss(images, texts, self._strong_scale, **exchange)
        else:
            term = self._cross_modal_loss(views, targets, **exchange)
        return loss + self.term_weight * term

    def targets(self, features: Features) -> dict[View, Tensor]:
        """The projections of every view."""
        return self.projectors(features.views())

    @property
    def _strong_scale(self) -> Tensor:
        return (self.strong_logit_scale if self.two_spaces else self.weak_logit_scale).exp()

    def _clip_loss(self, embedded: Mapping[View, Tensor], **exchange: Any) -> Tensor:
        (image, text), *pairs = self.pairs
        weak = clip_loss(embedded[image], embedded[text], self.weak_logit_scale.exp(), **exchange)
        if not pairs:
            return weak
        exchange |= {"logit_scale": self._strong_scale, "label_smoothing": self.label_smoothing}
        strong = [clip_loss(embedded[image], embedded[text], **exchange) for image, text in pairs]
        return (weak + self.strong_views * torch.stack(strong).mean()) / (1 + self.strong_views)

    def _prototype_loss(
        self, views: Mapping[View, Tensor], prototypes: nn.Linear, **exchange: Any
    ) -> Tensor:
        projected = self.projectors(views)
        images, texts = (F.normalize(projected[View(m, 0)], dim=-1) for m in MODALITIES)
        directions = F.normalize(prototypes.weight, dim=-1)
        scale = 1 / PROTOTYPE_TEMPERATURE
        return prototype_assignment_loss(images, texts, directions, scale, **exchange)

    def _cross_modal_loss(
        self, views: Mapping[View, Tensor], targets: Mapping[View, Tensor] | None, **exchange: Any
    ) -> Tensor:
        projected = self.projectors(views)
        if self.term == "barlip":
            pairs = [(projected[image], projected[text]) for image, text in self.pairs]
            terms = [cross_correlation_loss(*pair, **exchange) for pair in pairs]
        else:
            predicted = self.predictors(projected)
            wanted = projected if targets is None else targets
            ways = [*self.pairs, *((text, image) for image, text in self.pairs)]
            terms = [prediction_loss(predicted[a], wanted[b], **exchange) for a, b in ways]
        return torch.stack(terms).mean()


def _check(
    term: str | None, strong_views: int, label_smoothing: float, prototypes: int | None
) -> None:
    if term is not None and term not in TERMS:
        raise ValueError(f"term is {term!r}; give None or one of {', '.join(TERMS)}")
    if strong_views < 0:
        raise ValueError(f"strong_views is {strong_views}; give 0 or more")
    if prototypes is not None and (term != "swalip" or strong_views != 0 or prototypes < 1):
        raise ValueError(
            f"prototypes is {prototypes}; give 1 or more with term='swalip' and strong_views=0"
        )
    if term in ("slip", "swalip") and prototypes is None and strong_views != 2:
        raise ValueError(f"strong_views is {strong_views}; {term} compares 2")
    if label_smoothing and term == "swalip":
        raise ValueError(
            f"label_smoothing is {label_smoothing}; swalip has soft targets already, leave it out"
        )
    if label_smoothing and (term == "slip" or strong_views == 0):
        raise ValueError(
            f"label_smoothing is {label_smoothing}, of pairs of strong views, and there are none; "
            "leave it out"
        )


class Rocket(TwoTowers):
    """open_clip towers under `RocketCriterion`: 1 + R image and text views; slip has one text.

    Encodings are [sqrt(w) * weak; sqrt(1 - w) * strong] of the heads' normalized outputs, so that
    inner products are w * cos_weak + (1 - w) * cos_strong (the paper's interpolation of scores).
    Where strong views have no heads of their own they are the weak part alone.

    Args:
        towers: see `TwoTowers`.
        width, options: see `RocketCriterion`.
        text_dropout: of the text tower for strong views, see `TextDropout`; 0 for none. Gradient
            checkpointing is then the image tower's alone: layers are run again without dropout.
        prototypes_frozen_steps: first steps of a run in which prototypes are not updated.

    Attributes:
        head_weight: w, 0-d, in [0, 1]; 0.5 until it is chosen on held-out data.
    """

    criterion: RocketCriterion
    head_weight: Tensor

    def __init__(
        self,
        towers: nn.Module,
        width: int,
        *,
        text_dropout: float = 0.0,
        prototypes_frozen_steps: int = 0,
        **options: Any,
    ) -> None:
        criterion = RocketCriterion(width, **options)
        views = 1 + criterion.strong_views
        super().__init__(towers, criterion, views, 1 if criterion.term == "slip" else views)
        self.needs_teacher = criterion.term == "byolip"
        self.text_dropout = TextDropout(towers, text_dropout) if text_dropout else None
        self.prototypes_frozen_steps = prototypes_frozen_steps
        self.register_buffer("head_weight", torch.tensor(0.5))

    @classmethod
    def of(cls, towers: nn.Module, width: int, options: SystemOptions) -> "Rocket":
        """The system that the flags name."""
        return cls(
            towers,
            width,
            term=None if options.objective == "rocket" else options.objective,
            strong_views=options.strong,
            head_width=options.head_width,
            head_hidden=options.head_hidden,
            separate_heads=options.separate_heads,
            projector_hidden=options.projector_hidden,
            projector_width=options.projector_width,
            separate_projectors=options.separate_projectors,
            prototypes=options.prototypes,
            term_weight=options.extra_weight,
            label_smoothing=options.label_smoothing,
            text_dropout=options.text_dropout,
            prototypes_frozen_steps=options.prototypes_frozen_steps,
        )

    def features(self, batch: Mapping[str, Any]) -> Features:
        """See `TwoTowers.features`; strong texts with the dropout that they may have."""
        if self.text_dropout is None:
            return super().features(batch)
        images = [self.towers.encode_image(view) for view in batch["images"]]
        weak, *strong = batch["texts"]
        texts = [self.towers.encode_text(weak)]
        with self.text_dropout.active():
            texts += [self.towers.encode_text(view) for view in strong]
        return Features(images, texts)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `TwoTowers.set_grad_checkpointing`; with text dropout of the image tower alone."""
        tower = self.towers if self.text_dropout is None else self.towers.visual
        tower.set_grad_checkpointing(enable)

    def frozen(self, step: int) -> tuple[str, ...]:
        """See `System.frozen`: the prototypes, at the beginning."""
        frozen = self.criterion.prototypes is not None and step < self.prototypes_frozen_steps
        return (f"{PREFIX}prototypes.weight",) if frozen else ()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(N, 3, S, S) to (N, D), normalized with either `normalize`: parts are weighed as such."""
        return self._encode("image", self.towers.encode_image(image))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(N, L) tokens to (N, D), normalized with either `normalize`, as images are."""
        return self._encode("text", self.towers.encode_text(text))

    def _encode(self, modality: Modality, rows: Tensor) -> Tensor:
        weak = self.criterion.embed(View(modality, 0), rows)
        if not self.criterion.two_spaces:
            return weak
        return self.weigh(weak, self.criterion.embed(View(modality, 1), rows))

    def weigh(self, weak: Tensor, strong: Tensor) -> Tensor:
        """The encoding, (N, 2 D), of its normalized parts, (N, D) each, by `head_weight`."""
        # evaluation averages features on the CPU, wherever the model is
        weight = self.head_weight.to(weak.device)
        return torch.cat([weight.sqrt() * weak, (1 - weight).sqrt() * strong], dim=-1)

    def weak_and_strong(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized parts of encodings or of their averages: for other weights, `weigh` them.

        A part encoded with weight 0 is lost, and is zeros.

        Raises:
            ValueError: encodings of this system have one part.
        """
        if not self.criterion.two_spaces:
            raise ValueError("encodings have one part: strong views have no heads of their own")
        weak, strong = features.chunk(2, dim=-1)
        return F.normalize(weak, dim=-1), F.normalize(strong, dim=-1)

    def renormalize(self, features: Tensor) -> Tensor:
        """See `System.renormalize`; each part is normalized by itself and weighed again."""
        if not self.criterion.two_spaces:
            return super().renormalize(features)
        return self.weigh(*self.weak_and_strong(features))

    def logit_scale(self, parameter: Callable[[str], Tensor]) -> float:
        """See `System.logit_scale`: the weak pair's."""
        return parameter(PREFIX + "weak_logit_scale").exp().item()
