"""CLIP's loss and two that build on it, which replace the open_clip classes of the same names."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, clip_loss, distillation_loss, info_nce_loss
from fastclip.losses.base import Loss
from fastclip.ops.backend import check_backend
from fastclip.ops.checks import GroupRole, as_scalar, check_group_role, checked_sizes, widened
from fastclip.ops.collectives import average_gradient, check_exchange, gather_rows, scale_gradient
from fastclip.ops.reductions import with_bias

_NOT_THE_GRADIENT = {
    False: "gather_with_grad=False divides the towers' gradient by the number of processes, and "
    "not the logit scale's",
    True: "local_loss=True with gather_with_grad=False leaves out how a rank's features act in the "
    "other ranks' losses: its gradient points elsewhere than the full batch's",
}


class ClipLoss(Loss):
    """Drop-in for `open_clip.ClipLoss`: same arguments, call and value, memory linear in N.

    Over several processes each computes its share of the similarity matrix: two thirds of
    open_clip's matrix products with local_loss, half of its traffic. The four modes have
    open_clip's values and gradients of the features on every rank; a logit scale's gradient is
    open_clip's after data-parallel averaging. With gather_with_grad that is the full batch's
    gradient. The two modes without it are not, and warn once.

    Args:
        local_loss: whether the value is that of the rank's own pairs, or of all.
        gather_with_grad: whether gradients flow to the features of other ranks.
        cache_labels: accepted as in open_clip; nothing is cached.
        rank, world_size: this process's number in `group`, and how many there are.
        use_horovod: must be False.
        label_smoothing: in [0, 1); mass spread evenly over each direction's candidates.
        dist: "gather" brings all ranks' texts at once, "ring" one rank's after the other.
        group: the process group; None: the default one.
        sizes: rows of every process, where they differ; None: equally many. Needs
            gather_with_grad. With local_loss the value is then the own pairs' sum times
            world_size / all rows, so that its average over the processes is the full batch's.
        group_role: of the ids that a call is given: "excluded": pairs of one id are no negatives of
            each other; "positive": they are positives.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: `dist` is unknown, Horovod is asked for, or label smoothing where neither
            gradients are gathered nor the loss is global, or sizes that do not fit.

    Examples:
        >>> import torch
        >>> from fastclip import ClipLoss
        >>> loss = ClipLoss()  # in place of open_clip.ClipLoss()
        >>> images, texts, scale = torch.eye(3), torch.eye(3), torch.tensor(2.0)
        >>> round(loss(images, texts, scale).item(), 4)
        0.2395
        >>> list(loss(images, texts, scale, output_dict=True))
        ['contrastive_loss']
    """

    _can_be_local_without_gradient = True

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        dist: Exchange = "gather",
        group: ProcessGroup | None = None,
        sizes: Sequence[int] | None = None,
        group_role: GroupRole = "excluded",
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_exchange(dist)
        check_backend(backend)
        check_group_role(group_role)
        if use_horovod:
            raise ValueError("use_horovod=True: Horovod is not supported, use torch.distributed")
        self.sizes = checked_sizes(sizes, world_size)
        if sizes is not None and not gather_with_grad:
            raise ValueError(f"sizes are {tuple(sizes)}; they need gather_with_grad=True")
        if world_size > 1 and not gather_with_grad:
            if local_loss and (label_smoothing or not self._can_be_local_without_gradient):
                raise ValueError(
                    "local_loss with label smoothing or distillation needs gather_with_grad=True"
                )
            if local_loss and group_role == "positive":
                raise ValueError("local_loss with groups needs gather_with_grad=True")
            _warn_once(
                f"{_NOT_THE_GRADIENT[local_loss]}. For the full batch's gradient set "
                "gather_with_grad=True (--gather-with-grad, best with --local-loss)"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.label_smoothing = label_smoothing
        self.dist: Exchange = dist
        self.group = group
        self.group_role: GroupRole = group_role
        self.backend = backend
        self.chunk_bytes = chunk_bytes
        self.keep_bytes = keep_bytes

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The index of each row's positive, (num_logits,) int64; open_clip's subclasses call it.

        Args:
            device: where it is put.
            num_logits: rows of this process.
        """
        labels = torch.arange(num_logits, device=device, dtype=torch.long)
        if self.world_size > 1 and self.local_loss:
            labels = labels + self._first_row(num_logits)
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image (N, M) and per text (M, N), in full: for inspection, not for training.

        Over several processes they are between all ranks' features, or with local_loss between
        this rank's and all.

        Args:
            image_features: (N, D), normalized.
            text_features: (M, D), normalized.
            logit_scale: 0-d or (1,), exponentiated.
            logit_bias: 0-d, (1,) or None, added to every logit.
        """
        images, texts = self._gather(image_features), self._gather(text_features)
        own = self.world_size > 1 and self.local_loss
        logits_per_image = logit_scale * (image_features if own else images) @ texts.T
        logits_per_text = logit_scale * (text_features if own else texts) @ images.T
        if logit_bias is not None:
            return logits_per_image + logit_bias, logits_per_text + logit_bias
        return logits_per_image, logits_per_text

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        row_group: Tensor | None = None,
        column_group: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features: (N, D), normalized.
            text_features: (M, D), normalized, M >= N; those beyond the N-th are hard negatives.
            logit_scale: 0-d or (1,), exponentiated.
            logit_bias: 0-d, (1,) or None; cancels in this loss.
            output_dict: whether to return a dictionary.
            row_group, column_group: (N,) and (M,) integer ids of the images and texts, both or
                neither; `group_role` says what one id in both means.
        """
        features = image_features, text_features
        options: dict[str, Any] = {
            "backend": self.backend,
            "chunk_bytes": self.chunk_bytes,
            "keep_bytes": self.keep_bytes,
        }
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            if row_group is not None or column_group is not None:
                raise ValueError("local_loss with groups needs gather_with_grad=True")
            loss = self._rows_alone(*features, logit_scale, options)
            loss = with_bias(loss, logit_bias)
        else:
            options["label_smoothing"] = self.label_smoothing
            options |= {"row_group": row_group, "column_group": column_group}
            options["group_role"] = self.group_role
            options |= self._sharing()
            scale = self._averaged(logit_scale, image_features)
            loss = clip_loss(*self._scaled(features), scale, logit_bias, **options)
            loss = self._mean_of_own(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def _first_row(self, own: int) -> int:
        """The index among all rows of this process's first one."""
        return own * self.rank if self.sizes is None else sum(self.sizes[: self.rank])

    def _mean_of_own(self, each: Tensor) -> Tensor:
        """This process's loss; its average over the processes is the mean over all pairs."""
        if self.sizes is None or each.ndim == 0:
            return each.mean()
        return each.sum() * (self.world_size / sum(self.sizes))

    def _rows_alone(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """The loss of own rows, other features and the own ones among them being constants."""
        if images.shape != texts.shape:
            raise ValueError(
                f"{images.shape[0]} images and {texts.shape[0]} texts: hard negatives need "
                "gather_with_grad=True"
            )
        n = images.shape[0]
        positive = torch.arange(self.rank * n, (self.rank + 1) * n, device=images.device)
        one, other = (
            info_nce_loss(
                own,
                gather_rows(keys.detach(), self.group, with_grad=False),
                logit_scale,
                positive,
                **options,
            )
            for own, keys in ((images, texts), (texts, images))
        )
        return (one + other) / 2

    def _scaled(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The features; without gather_with_grad their gradient is divided by world_size."""
        if self.world_size == 1 or self.gather_with_grad:
            return features
        images, texts = (scale_gradient(f, 1 / self.world_size) for f in features)
        return images, texts

    def _sharing(self) -> dict[str, Any]:
        """How a functional form shares its work over the ranks."""
        if self.world_size == 1:
            return {}
        options = {"dist": self.dist, "group": self.group, "sizes": self.sizes}
        return options | ({"reduction": "none"} if self.local_loss else {})

    def _averaged(self, scale: Tensor, like: Tensor) -> Tensor:
        """The scale; of a global loss, its gradient is averaged over the processes."""
        alone = self.world_size == 1 or self.local_loss
        if alone or not isinstance(scale, Tensor) or not scale.requires_grad:
            return scale
        # the gradient is exchanged where the features are, and in no 16 bits
        scale = widened(as_scalar("logit_scale", scale, like), like)
        return average_gradient(scale, self.group)

    def _gather(self, features: Tensor) -> Tensor:
        if self.world_size == 1:
            return features
        sizes = self.sizes
        return gather_rows(features, self.group, with_grad=self.gather_with_grad, sizes=sizes)


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


class CoCaLoss(ClipLoss):
    """Drop-in for `open_clip.CoCaLoss`: the contrastive and the captioning loss.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two; 0 leaves the contrastive one out.
        pad_id: the token that captions are padded with; not predicted.
        local_loss: whether the contrastive value is that of the rank's own pairs, or of all.
        gather_with_grad: whether gradients flow to the features of other ranks.
        cache_labels: accepted as in open_clip; nothing is cached.
        rank, world_size: this process's number in the default group, and how many there are.
        use_horovod: must be False.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Examples:
        >>> import torch
        >>> from fastclip import CoCaLoss
        >>> loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        >>> tokens = torch.tensor([[4, 2], [3, 0]])  # captions of two words and of one
        >>> scores = torch.zeros(2, 2, 8)
        >>> clip, caption = loss(torch.eye(2), torch.eye(2), scores, tokens, torch.tensor(2.0))
        >>> round(clip.item(), 4), round(caption.item(), 4)
        (0.1269, 4.1589)
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            backend=backend,
            chunk_bytes=chunk_bytes,
            keep_bytes=keep_bytes,
        )
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # open_clip's own signature
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The weighted contrastive and captioning losses, 0-d each.

        Args:
            image_features: (N, D), normalized.
            text_features: (M, D), normalized, M >= N; those beyond the N-th are hard negatives.
            logit_scale: 0-d or (1,), exponentiated.
            logits: (N, L, V), the decoder's scores of each next token.
            labels: (N, L) int64, the tokens.
            output_dict: whether to return {"contrastive_loss": ..., "caption_loss": ...}.
        """
        if self.clip_loss_weight:
            contrastive = super().forward(image_features, text_features, logit_scale)
            assert isinstance(contrastive, Tensor)
            clip = self.clip_loss_weight * contrastive
        else:
            clip = torch.zeros((), dtype=torch.long, device=logits.device)
        caption = self.caption_loss(logits.permute(0, 2, 1), labels) * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": clip, "caption_loss": caption}
        return clip, caption


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.DistillClipLoss`: the contrastive loss and a teacher's.

    The teacher gets no gradient: compute its features under `torch.no_grad()`, as the
    open_clip trainer does. Over several processes each computes its own images among all texts and
    its own texts among all images.

    Args:
        local_loss: whether the value is that of the rank's own pairs, or of all.
        gather_with_grad: whether gradients flow to the features of other ranks.
        cache_labels: accepted as in open_clip; nothing is cached.
        rank, world_size: this process's number in `group`, and how many there are.
        use_horovod: must be False.
        label_smoothing: in [0, 1), of the contrastive loss.
        dist: "gather" brings all ranks' texts at once, "ring" one rank's after the other.
        group: the process group; None: the default one.
        sizes: rows of every process, where they differ; None: equally many. Needs
            gather_with_grad. With local_loss the value is then the own pairs' sum times
            world_size / all rows, so that its average over the processes is the full batch's.
        group_role: of the ids that a call is given: "excluded": pairs of one id are no negatives of
            each other in the contrastive loss; "positive": they are positives.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: `dist` is unknown, Horovod is asked for, or local_loss without gather_with_grad
            over several processes.

    Examples:
        >>> import torch
        >>> from fastclip import DistillClipLoss
        >>> student = torch.eye(3), torch.eye(3), torch.tensor(2.0)
        >>> teacher = torch.eye(3), torch.eye(3), torch.tensor(5.0)
        >>> contrastive, distill = DistillClipLoss()(*student, *teacher)
        >>> round(contrastive.item(), 4), round(distill.item(), 4)
        (0.2395, 0.2661)
    """

    _can_be_local_without_gradient = False

    def forward(  # type: ignore[override]  # open_clip's own signature
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
        *,
        row_group: Tensor | None = None,
        column_group: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The contrastive loss and the cross-entropy under the teacher's softmax, 0-d each.

        Args:
            image_features, text_features: (N, D), normalized; as many texts as images.
            logit_scale: 0-d or (1,), exponentiated.
            dist_image_features, dist_text_features: (N, E), the teacher's, normalized.
            dist_logit_scale: 0-d or (1,), the teacher's, exponentiated.
            output_dict: whether to return {"contrastive_loss": ..., "distill_loss": ...}.
            row_group, column_group: (N,) integer ids of the images and texts, both or neither;
                `group_role` says what one id in both means.
        """
        contrastive = super().forward(
            image_features,
            text_features,
            logit_scale,
            row_group=row_group,
            column_group=column_group,
        )
        assert isinstance(contrastive, Tensor)
        distill = distillation_loss(
            *self._scaled((image_features, text_features)),
            self._averaged(logit_scale, image_features),
            dist_image_features,
            dist_text_features,
            dist_logit_scale,
            # chunked everywhere: two matrices at a time, no fused kernel
            backend="reference" if self.backend == "reference" else "auto",
            chunk_bytes=self.chunk_bytes,
            **self._sharing(),
        )
        loss = self._mean_of_own(distill)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": loss}
        return contrastive, loss
