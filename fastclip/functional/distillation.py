"""A teacher's softmax over the pairs of a batch as the target of a student's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops.collectives import Exchange, gather_rows
from fastclip.ops.distillation import distillation
from fastclip.ops.reductions import check_reduction, ranks_sharing, reduce


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Cross-entropy of a student's softmax under a teacher's, over rows and columns.

    As the distillation term of open_clip's `DistillClipLoss`, without either matrix stored: memory
    is linear in the pairs. The teacher gets no gradient.

    Args:
        image_features, text_features: (N, D), the student's, normalized; as many texts as images.
        logit_scale: 0-d or (1,) tensor, or a number: the student's inverse temperature.
        teacher_image_features, teacher_text_features: (N, E), the teacher's, normalized.
        teacher_logit_scale: 0-d or (1,) tensor, or a number: the teacher's inverse temperature.
        reduction: "mean" over the N pairs of the mean of both directions; "sum": N times that;
            "none": each pair's, (N,).
        backend: "auto", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, those of all are gathered in any case, and each process computes its
            rows and columns. Averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (N,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or the teacher requires a
            gradient.

    Examples:
        >>> import torch
        >>> from fastclip.functional import distillation_loss
        >>> student, teacher = torch.eye(3), torch.eye(3)
        >>> loss = distillation_loss(student, student, 2.0, teacher, teacher, 5.0)
        >>> round(loss.item(), 4)
        0.2661
    """
    check_reduction(reduction)
    ranks = ranks_sharing(dist, group, sizes, image_features)
    scales = logit_scale, teacher_logit_scale
    options: dict[str, Any] = {
        "backend": backend,
        "chunk_bytes": chunk_bytes,
        "precision": precision,
    }
    student = image_features, text_features
    teacher = teacher_image_features, teacher_text_features
    if len(image_features) != len(text_features):
        raise ValueError(
            f"{len(image_features)} images and {len(text_features)} texts; distillation is of pairs"
        )
    if ranks is None:
        row, column = distillation(*student, scales[0], *teacher, scales[1], **options)
        return reduce((row + column) / 2, reduction, None)
    if torch.is_grad_enabled() and any(features.requires_grad for features in teacher):
        raise ValueError(
            "the teacher requires a gradient, and the processes exchange none of it; compute its "
            "features under torch.no_grad()"
        )
    images, texts = (gather_rows(f, group, with_grad=True, sizes=sizes) for f in student)
    of_images, of_texts = (gather_rows(f, group, with_grad=False, sizes=sizes) for f in teacher)
    options["columns"] = False
    # own images among all texts, own texts among all images
    row, _ = distillation(
        image_features, texts, scales[0], teacher[0], of_texts, scales[1], **options
    )
    column, _ = distillation(
        text_features, images, scales[0], teacher[1], of_images, scales[1], **options
    )
    return reduce((row + column) / 2, reduction, ranks)
