"""CLIP's loss and two that build on it, in place of open_clip's classes of the same names."""

import torch
from torch import Tensor, nn

from fastclip.functional import clip_loss
from fastclip.ops.collectives import gather_rows
from fastclip.ops.distillation import distillation


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss`: same arguments, call and value, memory linear in N.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: open_clip's.
            Over several processes features are gathered over the default process group, which
            must have world_size ranks, and every rank computes the global loss. gather_with_grad
            gives the full batch's gradient under data-parallel averaging. Without it, features
            of other ranks are constants, which divides the towers' gradient by world_size, as in
            open_clip.
        label_smoothing: see `fastclip.functional.clip_loss`.
        backend, chunk_bytes: see `fastclip.functional.clip_loss`.

    Raises:
        ValueError: Horovod is asked for, or local_loss without gather_with_grad: that gradient
            points elsewhere than the full batch's.
    """

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
        backend: str = "auto",
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True: Horovod is not supported, use torch.distributed")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "local_loss without gather_with_grad is not the gradient of any loss over the "
                "full batch; set gather_with_grad=True"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.chunk_bytes = chunk_bytes

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The index of each row's positive, (num_logits,) int64; open_clip's subclasses call it."""
        labels = torch.arange(num_logits, device=device, dtype=torch.long)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
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

        Args: as `forward`'s.
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
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features: (N, D), normalised.
            text_features: (M, D), normalised, M >= N; those beyond the N-th are hard negatives.
            logit_scale: 0-d or (1,), exponentiated.
            logit_bias: 0-d, (1,) or None; cancels in this loss.
            output_dict: whether to return a dictionary.
        """
        local = self.world_size > 1 and self.local_loss
        if self.world_size > 1 and image_features.shape[0] != text_features.shape[0]:
            raise ValueError(
                f"{image_features.shape[0]} images and {text_features.shape[0]} texts: hard "
                "negatives over several processes are not supported"
            )
        loss = clip_loss(
            self._gather(image_features),
            self._gather(text_features),
            logit_scale,
            logit_bias,
            label_smoothing=self.label_smoothing,
            reduction="none" if local else "mean",
            backend=self.backend,
            chunk_bytes=self.chunk_bytes,
        )
        if local:
            n = image_features.shape[0]
            loss = loss[self.rank * n : (self.rank + 1) * n].mean()
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(self, features: Tensor) -> Tensor:
        if self.world_size == 1:
            return features
        return gather_rows(features, with_grad=self.gather_with_grad)


class CoCaLoss(ClipLoss):
    """Drop-in for `open_clip.CoCaLoss`: the contrastive and the captioning loss.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two; 0 leaves the contrastive one out.
        pad_id: the token that captions are padded with; not predicted.
        further arguments: see `ClipLoss`.
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
            image_features, text_features, logit_scale: see `ClipLoss`.
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

    Arguments are those of `ClipLoss`. The teacher gets no gradient: compute its features under
    `torch.no_grad()`, as open_clip's trainer does.
    """

    def forward(  # type: ignore[override]  # open_clip's own signature
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The contrastive loss and the cross-entropy under the teacher's softmax, 0-d each.

        Args:
            image_features, text_features, logit_scale: see `ClipLoss`; as many texts as images.
            dist_image_features, dist_text_features: (N, E), the teacher's, normalised.
            dist_logit_scale: 0-d or (1,), the teacher's, exponentiated.
            output_dict: whether to return {"contrastive_loss": ..., "distill_loss": ...}.
        """
        contrastive = super().forward(image_features, text_features, logit_scale)
        assert isinstance(contrastive, Tensor)
        row, column = distillation(
            self._gather(image_features),
            self._gather(text_features),
            logit_scale,
            self._gather(dist_image_features),
            self._gather(dist_text_features),
            dist_logit_scale,
            # chunked everywhere: two matrices at a time, no fused kernel
            backend="reference" if self.backend == "reference" else "auto",
            chunk_bytes=self.chunk_bytes,
        )
        distill = (row + column) / 2
        if self.world_size > 1 and self.local_loss:
            n = image_features.shape[0]
            distill = distill[self.rank * n : (self.rank + 1) * n]
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill.mean()}
        return contrastive, distill.mean()
