"""What the losses have in common: `print(loss)` shows how a loss was made."""

import inspect
from typing import Any

from torch import nn


class Loss(nn.Module):
    """A module whose text names its settings, as far as they are not the defaults.

    A setting is an argument of `__init__` that is kept as an attribute of the same name, or in
    `options`.

    Examples:
        >>> from fastclip import ClipLoss
        >>> ClipLoss(label_smoothing=0.1)
        ClipLoss(label_smoothing=0.1)
    """

    def __init__(self) -> None:
        super().__init__()

    def extra_repr(self) -> str:
        # what is shown in the brackets of the module's text
        kept: dict[str, Any] = {**vars(self), **vars(self).get("options", {})}
        # a subclass may pass arguments on that it does not name
        signatures = [
            inspect.signature(kind.__init__).parameters
            for kind in reversed(type(self).__mro__)
            if issubclass(kind, Loss)
        ]
        defaults = {p.name: p.default for parameters in signatures for p in parameters.values()}
        shown = (
            f"{name}={kept[name]!r}"
            for name, default in defaults.items()
            # a setting that does not apply is None
            if name in kept and kept[name] is not None and kept[name] != default
        )
        return ", ".join(shown)
