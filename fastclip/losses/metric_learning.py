"""pytorch-metric-learning's SupConLoss: its names, arguments, calls and values."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.functional import sup_con_loss
from fastclip.losses.base import Loss
from fastclip.ops.checks import check_positive


class MetricLearningSupConLoss(Loss):
    """Drop-in for pytorch-metric-learning's `SupConLoss`, memory linear in N.

    Normalizes inside, as there, and averages over the anchors whose loss is above 0, as its
    default reducer does. Also made by `SupConLoss.metric_learning(...)`.

    Args:
        temperature: > 0; similarities are divided by it.
        distance: None, or a `CosineSimilarity` or `DotProductSimilarity` of
            pytorch-metric-learning: whether they normalize decides; any other is refused.
        reducer: None or an `AvgNonZeroReducer`; any other is refused.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: a temperature that is not positive, a distance or a reducer of another kind.

    Examples:
        >>> import torch
        >>> from fastclip.losses.metric_learning import MetricLearningSupConLoss
        >>> loss = MetricLearningSupConLoss(temperature=0.5)
        >>> round(loss(3 * torch.eye(3), torch.tensor([7, 7, 2])).item(), 4)
        0.6931
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        distance: Any = None,
        reducer: Any = None,
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        _check_reducer(reducer)
        self.temperature = temperature
        self.normalize_embeddings = _normalizes(distance)
        self.options: dict[str, Any] = {
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d; 0 where no label occurs twice or all are the same.

        Args:
            embeddings: (N, D), of any length.
            labels: (N,) integers.
            indices_tuple, ref_emb, ref_labels: must be None: pairs chosen by a miner, and
                references other than the batch, are not computed.

        Raises:
            ValueError: no labels, or one of those that must be None.
        """
        given = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} is given: fastclip compares all rows of a batch with each other; "
                    "leave it out or keep pytorch-metric-learning's loss"
                )
        if labels is None:
            raise ValueError("labels are None; give (N,) integers")
        if self.normalize_embeddings:
            embeddings = F.normalize(embeddings, dim=1)
        labels = labels.to(embeddings.device).long()
        each = sup_con_loss(embeddings, labels, self.temperature, reduction="none", **self.options)
        # theirs has no loss without a negative
        several = (labels != labels[:1]).any()
        each = torch.where(several, each, 0.0)
        return each.sum() / (each.detach() > 0).sum().clamp(min=1)


def _normalizes(distance: Any) -> bool:
    if distance is None:
        return True
    kind = type(distance).__name__
    if kind not in ("CosineSimilarity", "DotProductSimilarity") or distance.power != 1:
        raise ValueError(
            f"distance is {kind} with power {getattr(distance, 'power', None)}; use None, a "
            "CosineSimilarity or a DotProductSimilarity with power 1"
        )
    if distance.normalize_embeddings and distance.p != 2:
        raise ValueError(f"distance normalizes by the {distance.p}-norm; use p=2")
    return bool(distance.normalize_embeddings)


def _check_reducer(reducer: Any) -> None:
    if reducer is not None and type(reducer).__name__ != "AvgNonZeroReducer":
        raise ValueError(
            f"reducer is {type(reducer).__name__}; use None or an AvgNonZeroReducer, its default"
        )
