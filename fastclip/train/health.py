"""Finding out what went wrong in a step, before it is taken."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What `first_non_finite` says where every tensor is finite.
NOTHING = "the loss itself"
# how what it says begins, in the order of the computation
_KINDS = ("input", "parameter", "output", "gradient", NOTHING)


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite; no parameter was changed."""


def first_non_finite(
    model: nn.Module, inputs: dict[str, Tensor], forward: Callable[[], Any]
) -> str:
    """The name of the first tensor of a step that holds NaN or infinity.

    Looks, in the order of the computation, at the inputs, the parameters, each module's output
    (by running `forward` once more under hooks) and at last the gradients. Of parameters that are
    sharded over processes it sees this process's rows. `forward` is run whatever is found before,
    since other processes may find nothing, and wait in theirs for this one.

    Args:
        inputs: what went into the step, by name.
        forward: repeats the step's forward; its result is not used.
    """
    found = [f"input {name!r}" for name, tensor in inputs.items() if _is_bad(tensor)]
    found += [f"parameter {name!r}" for name, p in model.named_parameters() if _is_bad(p)]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output.values() if isinstance(output, dict) else output
            for tensor in tensors if isinstance(output, (tuple, list, dict)) else (output,):
                if isinstance(tensor, Tensor) and _is_bad(tensor):
                    found.append(f"output of {name!r}")

        return hook

    # children before parents, so that the innermost module is the one named
    modules = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _is_bad(parameter.grad):
            return f"gradient of {name!r}"
    return NOTHING


def earliest(found: Sequence[str]) -> int:
    """Which of the findings of `first_non_finite` comes first in the computation.

    A fault of one rank spreads: to the outputs of others, where its parameter is put together with
    theirs, or to their gradients.

    Examples:
        >>> from fastclip.train.health import earliest
        >>> earliest(["gradient of 'scale'", "input 'image 0'"])
        1
    """
    kinds = [next(i for i, kind in enumerate(_KINDS) if text.startswith(kind)) for text in found]
    return kinds.index(min(kinds))


def _is_bad(tensor: Tensor) -> bool:
    # a sharded one would ask all processes, and not all may look at it
    tensor = getattr(tensor, "_local_tensor", tensor)
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


class Hints:
    """Notices signs of a run that will not succeed, and says each once.

    Args:
        chance: the loss of a model that separates nothing, ln(batch) of CLIP's; None where it is
            not known.
        warmup: steps before which nothing is expected.
    """

    PATIENCE = 5
    # evaluations one after another, all clearly worse than the best
    RISES, MARGIN = 2, 0.01

    def __init__(self, chance: float | None, warmup: int) -> None:
        self.chance = chance
        self.warmup = warmup
        self._streaks: Counter[str] = Counter()
        self._best, self._best_step = math.inf, 0
        self._rises, self._memorizes = 0, False

    def observe(self, step: int, values: Mapping[str, float]) -> list[str]:
        """The hints that this line of metrics gives rise to."""
        chance = math.inf if self.chance is None else self.chance
        signs = {
            f"the loss stays at ln(batch) = {chance:.2f}: the model distinguishes no pair; "
            "check that captions belong to their images, lower --lr or lengthen --warmup": (
                # of a single sample there is nothing to distinguish
                step > self.warmup and chance > 0 and abs(values["loss"] / chance - 1) < 0.01
            ),
            "the logit scale stays at its cap of 100: the data may hold many duplicates, or "
            "--lr be too high": values.get("logit_scale", 0.0) > 99.9,
            "over half of the time is spent waiting for data: raise --workers, or store "
            "smaller images": values["data_wait"] > 0.5,
        }
        found = []
        for hint, present in signs.items():
            self._streaks[hint] = self._streaks[hint] + 1 if present else 0
            if self._streaks[hint] == self.PATIENCE:
                found.append(hint)
        return found

    def observe_validation(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The hints that an evaluation gives rise to, `step` steps into the run."""
        loss = metrics.get("val/loss", math.nan)
        if loss < self._best:
            self._best, self._best_step, self._rises = loss, step, 0
        elif loss > self._best * (1 + self.MARGIN):
            self._rises += 1
        if self._memorizes or self._rises < self.RISES:
            return []
        self._memorizes = True
        return [
            f"the validation loss has been rising since step {self._best_step:,}: the model "
            "memorizes the training data; use more data, stronger augmentation or fewer --epochs"
        ]
