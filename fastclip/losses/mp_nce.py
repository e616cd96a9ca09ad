"""UniCLIP's loss as a module: multi-positive NCE, a similarity of its own for each domain pair."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, mp_nce_loss
from fastclip.losses.base import Loss
from fastclip.ops.backend import check_backend
from fastclip.ops.checks import check_positive
from fastclip.ops.collectives import check_exchange


class MPNCELoss(Loss):
    """MP-NCE over the blocks of all views and texts (UniCLIP, Lee et al. 2022).

    The similarity of domains p and q is s = (cos - offset_pq) / temperature_pq; both are learned,
    one for each unordered pair, packed as (0, 0), (0, 1), ..., (1, 1), ...

    Args:
        num_domains: P; 2 for images and texts.
        init_temperature, init_offset: starting values of every pair.
        pair_weight: weights of the positives by domain pair: None for ones, "balanced" for
            weights under which every domain pair contributes alike, or a (P, P) tensor.
        max_scale: the limit that `clamp_scale_` holds 1 / temperature to.
        dist: None, or "gather" or "ring": processes share the loss. Features are then one
            process's rows, the loss is that of all, and gradients averaged over the processes
            (DDP) are the full batch's.
        group: the process group; None: the default one.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: an unknown `dist`, or numbers out of range.

    Examples:
        >>> import torch
        >>> from fastclip import MPNCELoss
        >>> loss = MPNCELoss(num_domains=2)
        >>> view1 = view2 = texts = torch.eye(3)
        >>> loss([view1, view2, texts], domains=[0, 0, 1]).backward()
        >>> loss.log_temperature.grad.shape, loss.offset.grad.shape  # of (0, 0), (0, 1), (1, 1)
        (torch.Size([3]), torch.Size([3]))
    """

    index: Tensor
    pair_weight: Tensor | None

    def __init__(
        self,
        num_domains: int = 2,
        *,
        init_temperature: float = 0.07,
        init_offset: float = 0.0,
        pair_weight: Tensor | Sequence[Sequence[float]] | str | None = None,
        max_scale: float = 100.0,
        dist: Exchange | None = None,
        group: ProcessGroup | None = None,
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if num_domains < 1:
            raise ValueError(f"num_domains is {num_domains}; give 1 or more")
        check_exchange(dist)
        check_backend(backend)
        check_positive("init_temperature", init_temperature)
        if isinstance(pair_weight, str) and pair_weight != "balanced":
            raise ValueError(f"pair_weight is {pair_weight!r}; give 'balanced', a tensor or None")
        self.num_domains = num_domains
        pairs = num_domains * (num_domains + 1) // 2
        self.log_temperature = nn.Parameter(torch.full((pairs,), math.log(init_temperature)))
        self.offset = nn.Parameter(torch.full((pairs,), init_offset))
        rows, columns = torch.triu_indices(num_domains, num_domains)
        index = torch.zeros(num_domains, num_domains, dtype=torch.long)
        index[rows, columns] = torch.arange(pairs)
        index[columns, rows] = torch.arange(pairs)
        self.register_buffer("index", index, persistent=False)
        self.balanced = isinstance(pair_weight, str)
        weight = None
        if pair_weight is not None and not isinstance(pair_weight, str):
            weight = torch.as_tensor(pair_weight)
            if weight.shape != (num_domains, num_domains):
                raise ValueError(
                    f"pair_weight is {tuple(weight.shape)}; give ({num_domains}, {num_domains})"
                )
        self.register_buffer("pair_weight", weight, persistent=False)
        self.max_scale = max_scale
        self.options: dict[str, Any] = {
            "dist": dist,
            "group": group,
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }

    def forward(
        self,
        features: Sequence[Tensor],
        domains: Sequence[int],
        *,
        row_group: Tensor | None = None,
    ) -> Tensor:
        """The mean over all anchors, 0-d.

        Args:
            features: B >= 2 blocks, each (N, D), normalized, in the same pair order.
            domains: the domain of each block, e.g. [0, 0, 0, 1] for three views and a text.
            row_group: (N,) integer ids; rows of other pairs of a pair's id are no negatives.
        """
        scale = torch.exp(-self.log_temperature)
        weight: Tensor | list[list[float]] | None = self.pair_weight
        if self.balanced:
            weight = balanced_pair_weight(domains, self.index.shape[0])
        return mp_nce_loss(
            features,
            domains,
            scale[self.index],
            (-self.offset * scale)[self.index],
            pair_weight=weight,
            row_group=row_group,
            **self.options,
        )

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Hold every 1 / temperature to at most `max_scale`; call it after an optimizer step."""
        self.log_temperature.clamp_(min=-math.log(self.max_scale))


def balanced_pair_weight(domains: Sequence[int], num_domains: int) -> list[list[float]]:
    """Weights by domain pair, mean 1 over positives, that give every pair present one share.

    Args:
        domains: the domain of each block, e.g. [0, 0, 0, 1] for three views and a text.
        num_domains: P.

    Returns:
        (P, P) as lists; the entry (a, b) with a <= b, 0 where the pair does not occur.

    Raises:
        ValueError: a domain that is not in [0, P).

    Examples:
        >>> from fastclip.losses.mp_nce import balanced_pair_weight
        >>> balanced_pair_weight([0, 0, 0, 1], num_domains=2)  # image-image, image-text
        [[1.0, 1.0], [0.0, 0.0]]
        >>> balanced_pair_weight([0, 0, 1], num_domains=2)  # one image-image pair, two image-text
        [[1.5, 0.75], [0.0, 0.0]]
    """
    if not all(0 <= domain < num_domains for domain in domains):
        raise ValueError(f"domains are {list(domains)}; give 0 to {num_domains - 1}")
    counts = [[0.0] * num_domains for _ in range(num_domains)]
    for index, p in enumerate(domains):
        for q in domains[index + 1 :]:
            counts[min(p, q)][max(p, q)] += 1
    total = sum(map(sum, counts))
    present = sum(count > 0 for row in counts for count in row)
    return [[total / (present * count) if count else 0.0 for count in row] for row in counts]
