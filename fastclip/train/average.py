"""A slowly following average of the weights: for evaluation, or as a teacher."""

import copy

import torch
from torch import Tensor, nn

# Grill et al. 2020 with Fini et al. 2023's constant rate
TEACHER_DECAY = 0.99


class WeightAverage:
    """The exponential moving average of a model's parameters, in float32 or better.

    After each update, average <- decay * average + (1 - decay) * parameter; buffers are copied.

    Args:
        model: begins the average; not changed.
        decay: share of the old average; in [0, 1).

    Attributes:
        model: a model of the averaged parameters, which need no gradient.

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; give one in [0, 1)")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._averaged: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the model, whose parameters may have another shape of as many entries."""
        pairs = zip(self._averaged, model.parameters(), strict=True)
        followed = [new.view_as(own).to(own.dtype) for own, new in pairs]
        torch._foreach_lerp_(self._averaged, followed, 1 - self.decay)
        for own, new in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(new)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters, and the buffers, under the model's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.model.load_state_dict(state)
